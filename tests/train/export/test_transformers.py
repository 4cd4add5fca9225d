"""`--format transformers`: transformers' own code on the folder gives our embeddings, logits and ids."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.config import LossConfig
from lit_fast.errors import UserError
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.tower import load_tower
from lit_fast.train.export import transformers as target
from lit_fast.train.export.writer import ExportOptions
from tests.helpers import picture
from tests.reference import torch_vit
from tests.torch_packages import import_package
from tests.train.export.cases import CENTERED, FULL, MASKED, MU, TEXT_TOWERS, TEXTS
from tests.trained import command, random_model, reference_texts
from tests.weights.checkpoints import HEADS, write_timm
from tests.weights.test_families import HUGGINGFACE, TIMM

# The class that a tower becomes, by the tower's name. DeiT's distillation token is one more register.
VISION = {
    "vit": "ViTModel",
    "vit in a classifier": "ViTModel",
    "deit": "Dinov2WithRegistersModel",
    "dinov2": "ViTModel",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "clip_vision_model": "CLIPVisionModel",
    "clip_vision_model alone": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
TEXT = TEXT_TOWERS | {
    "deep": {"width": 256, "heads": 4, "depth": 12},
    "deep, mean, masked": {"width": 256, "heads": 4, "depth": 12, "pooling": "mean", "mask_padding": True},
}


def export(model, folder):
    folder.mkdir()
    target.check(model, ExportOptions())
    target.write(model, str(folder), ExportOptions())
    return folder


def loaded_by_transformers(folder, name="VisionTextDualEncoderModel"):
    """Model and processor."""
    transformers = import_package("transformers")
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == name
    assert not any(report.values()), report
    return model, transformers.AutoProcessor.from_pretrained(folder, backend="pil")


def normalized(features):
    return features / features.norm(dim=-1, keepdim=True)


def compare_images(model, theirs, case):
    """Embeddings of images; returns the inputs of transformers, and those of the tower of HUGGINGFACE in float64."""
    import torch

    p = model.tower.preprocess
    images = [picture(i, p.size, p.size) for i in range(3)]
    pixels = np.stack([p.apply(image) for image in images])
    weights, gelu, epsilon, pool, _ = HUGGINGFACE[case]
    want = model.embed_features(torch_vit(pixels / 127.5 - 1, weights, HEADS, gelu, epsilon, pool))
    inputs = theirs[1].image_processor(images, return_tensors="pt")
    with torch.no_grad():
        got = theirs[0].get_image_features(**inputs).pooler_output
    # Unit vectors of 32 or more float32 components; measured at most 2e-6.
    np.testing.assert_allclose(normalized(got), want, rtol=0, atol=1e-5)
    return inputs, want


def compare_texts(model, theirs):
    """Ids, mask and embeddings of texts; returns the inputs of transformers, and our embeddings."""
    import torch

    inputs = theirs[1](text=TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    ids = inputs["input_ids"].numpy()
    if model.config.mask_padding:  # masked ids may differ
        seen = inputs["attention_mask"].numpy() == 1
        np.testing.assert_array_equal(seen.sum(1), [len(i) for i in model.tokenizer.encode(TEXTS)[0]])
        np.testing.assert_array_equal(ids[seen], model.tokenizer(TEXTS)[seen])
    else:
        np.testing.assert_array_equal(ids, model.tokenizer(TEXTS))
        assert "attention_mask" not in inputs
    want = reference_texts(model, TEXTS)
    with torch.no_grad():
        got = theirs[0].get_text_features(**inputs).pooler_output
    np.testing.assert_allclose(normalized(got), want, rtol=0, atol=1e-5)  # as of images
    return inputs, want


def compare_all(model, theirs, case, bias=0):
    """Both towers, apart and together, and the logits."""
    import torch

    (pixels, images), (ids, texts) = compare_images(model, theirs, case), compare_texts(model, theirs)
    with torch.no_grad():
        got = theirs[0](**pixels, **ids)
    np.testing.assert_allclose(got.image_embeds, images, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.text_embeds, texts, rtol=0, atol=1e-5)
    logits = np.exp(model.params["t"]) * images @ texts.T + bias
    np.testing.assert_allclose(got.logits_per_image, logits, rtol=0, atol=1e-4)  # a temperature of about 1


@pytest.mark.parametrize("case", VISION)
def test_vision_tower_of_a_family_embeds_as_ours(case, towers, tmp_path):
    model = random_model(towers(case), MASKED, FULL)
    theirs = loaded_by_transformers(export(model, tmp_path / "out"))
    assert type(theirs[0].vision_model).__name__ == VISION[case]
    compare_images(model, theirs, case)


def test_embeddings_and_logits_equal_ours(towers, tmp_path):
    model = random_model(towers("vit"), MASKED, FULL)
    compare_all(model, loaded_by_transformers(export(model, tmp_path / "out")), "vit")


@pytest.mark.parametrize("case", TEXT)
def test_text_tower_embeds_as_ours(case, towers, tmp_path):
    tower = towers("vit")
    fields = TEXT[case] | ({"width": tower.width} if case == "no head" else {})
    model = random_model(tower, replace(MU, **fields), CENTERED)
    compare_texts(model, loaded_by_transformers(export(model, tmp_path / "out")))


def test_siglip_tower_exports_as_siglip_model(towers, tmp_path):
    """Both towers as they are, with the bias; read again, they are the same."""
    tower = towers("siglip_vision_model")
    model = random_model(tower, MU, LossConfig())
    folder = export(model, tmp_path / "out")
    theirs = loaded_by_transformers(folder, "SiglipModel")
    compare_all(model, theirs, "siglip_vision_model", bias=model.params["b"])
    again = load_tower(str(folder))
    np.testing.assert_array_equal(again.params["pos_embedding"], tower.params["pos_embedding"])
    assert again.architecture == tower.architecture
    centered = random_model(tower, MU, replace(CENTERED, name="softmax"))
    theirs = loaded_by_transformers(export(centered, tmp_path / "centered"), "SiglipModel")
    compare_all(centered, theirs, "siglip_vision_model")


def test_masked_text_tower_is_independent_of_the_padding(towers, tmp_path):
    transformers = import_package("transformers")
    import torch

    model = random_model(towers("vit"), MASKED)
    folder = export(model, tmp_path / "out")
    loaded = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        got = loaded.get_text_features(**tokenizer(["x"], return_tensors="pt")).pooler_output[0]
    np.testing.assert_allclose(got / got.norm(), reference_texts(model, ["x"])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess("pil-crop", 32, 36),
        Preprocess("pil-squash", 32, 32, interpolation="bilinear", std=(0.2, 0.3, 0.4)),
        Preprocess("pil-squash", 32, 40, interpolation="lanczos"),
        Preprocess("hf-crop", 32, 38, mean=(0.1, 0.2, 0.3)),
    ],
)
def test_image_processor_pixels_equal_ours(preprocess, towers, tmp_path):
    """Of photos whose crops are even; with PIL to the last bit, before float32's rounding of mean and std."""
    transformers = import_package("transformers")
    model = random_model(replace(towers("vit"), preprocess=preprocess), MU)
    folder = export(model, tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    for width, height in ((72, 36), (36, 36), (40, 80), (300, 200)):
        image = picture(width, width, height)
        want = (preprocess.apply(image) / 255.0 - preprocess.mean) / preprocess.std
        got = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_check_unsupported_towers_raises(towers, tmp_path):
    tower = towers("vit")
    with pytest.raises(UserError, match=r"text\.pooling 'max'; export with --format lit_fast"):
        target.check(random_model(tower, replace(MU, pooling="max")), ExportOptions())
    for name in ("vit_giant_patch14_dinov2", "vit_medium_patch16_reg4_gap_256"):
        other = load_tower(str(write_timm(tmp_path / name, TIMM[name][0], name)))
        with pytest.raises(UserError, match=r"vision tower.*export with --format lit_fast"):
            target.check(random_model(other, MU), ExportOptions())


def test_export_writes_all_files_once(trained_run, tmp_path, capsys):
    out = tmp_path / "out"
    command("export", trained_run, "--format", "transformers", "--out", out)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert "has no bias" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["model_type"] == "vision-text-dual-encoder"
    assert main(["export", str(trained_run), "--format", "transformers", "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
