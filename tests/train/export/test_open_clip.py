"""`--format open_clip`: open_clip's own code on the folder gives our embeddings, logits, ids and accuracy."""

import io
import tarfile
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from PIL import Image

from lit_fast.cli.main import main
from lit_fast.config import LossConfig
from lit_fast.errors import UserError
from lit_fast.evaluation.zeroshot import canonical_names, canonical_templates, classifier
from lit_fast.models.architecture import Architecture
from lit_fast.models.sizes import VARIANTS
from lit_fast.models.vit import ViT
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.tower import Tower, load_tower
from lit_fast.train.export import open_clip as target
from lit_fast.train.export.writer import ExportOptions
from tests.helpers import picture
from tests.reference import torch_vit
from tests.torch_packages import import_package
from tests.train.export.cases import CENTERED, FULL, MASKED, MU, TEXT_TOWERS, TEXTS
from tests.trained import random_model, reference_texts
from tests.weights.checkpoints import HEADS, write_huggingface, write_timm
from tests.weights.test_families import HUGGINGFACE, TIMM

VISION = ["vit", "vit in a classifier", "dinov2", "clip_vision_model alone"]
# By timm's name: what else its tower is made of, beside sizes and the last part of the name.
BY_NAME = {
    "vit_base_patch32_siglip_256": Architecture(
        VARIANTS["B"], 32, "map", "tanh", class_token=False
    ),
    "vit_base_patch32_clip_quickgelu_224": Architecture(
        VARIANTS["B"], 32, "projection", "quick", 1e-5, pre_norm=True, projection=512
    ),
    "vit_small_patch14_reg4_dinov2": Architecture(VARIANTS["S"], 14, registers=4),
}  # fmt: skip


def squashed(tower):
    """A tower whose preprocessing open_clip has."""
    return replace(
        tower, preprocess=replace(tower.preprocess, method="pil-squash", resize=tower.preprocess.size)
    )


@pytest.fixture(scope="module")
def towers(towers):
    """Squashed."""
    return cache(lambda case: squashed(towers(case)))


def random_tower(a, size):
    """A tower of random weights, of about the size of trained ones."""
    shapes = jax.eval_shape(
        ViT(a).init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    )
    numbers = (
        np.random.default_rng(0).normal(0, 0.04, 999_983).astype(np.float32)
    )  # a prime: no two rows agree
    params = jax.tree.map(lambda s: np.resize(numbers, s.shape), shapes["params"])
    if a.pre_norm:
        params["embedding"]["bias"][:] = 0
    preprocess = Preprocess("pil-squash", size, size)
    return Tower("random", "random.npz", "", preprocess, params, a, None)


def export(model, folder):
    folder.mkdir()
    target.check(model, ExportOptions())
    target.write(model, str(folder), ExportOptions())
    return folder


def loaded_by_open_clip(folder):
    """Model, preprocessing and tokenizer."""
    open_clip = import_package("open_clip")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


def compare_images(model, theirs, case=""):
    """Pixels, and embeddings of an image; returns its pixels for open_clip, and our embedding.

    case: the key in HUGGINGFACE of the tower; without one the tower's own embeddings are the reference.
    """
    import torch

    image, p = picture(0), model.tower.preprocess
    pixels, inputs = p.apply(image)[None], theirs[1](image)[None]
    np.testing.assert_allclose(inputs.permute(0, 2, 3, 1), (pixels / 255 - p.mean) / p.std, rtol=0, atol=2e-6)
    if case:  # in float64
        weights, gelu, epsilon, pool, _ = HUGGINGFACE[case]
        features = torch_vit(pixels / 127.5 - 1, weights, HEADS, gelu, epsilon, pool)
    else:
        features = np.asarray(jax.jit(model.tower.embed)(model.tower.params, pixels))
    want = model.embed_features(features)
    with torch.no_grad():
        got = theirs[0].encode_image(inputs, normalize=True)
    # Unit vectors of 24 or more float32 components; measured at most 2e-6.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    return inputs, want


def compare_texts(model, theirs):
    """Ids, and embeddings of texts; returns the ids, and our embeddings."""
    import torch

    ids = theirs[2](TEXTS)
    padding = None if model.config.mask_padding else model.tokenizer.padding  # hidden, so it may be another
    np.testing.assert_array_equal(ids, replace(model.tokenizer, padding=padding)(TEXTS))
    want = reference_texts(model, TEXTS)
    with torch.no_grad():
        got = theirs[0].encode_text(ids, normalize=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # as of images
    return ids, want


@pytest.mark.parametrize("case", VISION)
def test_vision_transformer_of_a_family_embeds_as_ours(case, towers, tmp_path):
    model = random_model(towers(case), MASKED, FULL)
    compare_images(model, loaded_by_open_clip(export(model, tmp_path / "out")), case)


def test_vision_transformer_with_mean_pooling_embeds_as_ours(tmp_path):
    weights, _, _, _, config = HUGGINGFACE["vit"]
    tower = load_tower(str(write_huggingface(tmp_path / "tower", weights, "vit", **config)), pool="gap")
    model = random_model(squashed(tower), MU, FULL)
    compare_images(model, loaded_by_open_clip(export(model, tmp_path / "out")))


def test_vision_transformer_with_projection_embeds_as_ours(tmp_path):
    weights, _, _, _, _ = HUGGINGFACE["clip_vision_model"]
    path = write_huggingface(tmp_path / "tower", weights, "clip_vision_model", hidden_act="gelu")
    model = random_model(squashed(load_tower(str(path))), MU, FULL)
    compare_images(model, loaded_by_open_clip(export(model, tmp_path / "out")))


@pytest.mark.parametrize("name", BY_NAME)
def test_timm_tower_embeds_as_ours(name, tmp_path):
    size = int(name.rpartition("_")[2]) if name[-1].isdigit() and "dinov2" not in name else 518
    model = random_model(random_tower(BY_NAME[name], size), MU, FULL)
    theirs = loaded_by_open_clip(export(model, tmp_path / "out"))
    compare_images(model, theirs)
    assert type(theirs[0].visual).__name__ == "TimmModel"


@pytest.mark.parametrize("case", TEXT_TOWERS)
def test_text_tower_embeds_as_ours(case, towers, tmp_path):
    tower = towers("vit")
    fields = TEXT_TOWERS[case] | ({"width": tower.width} if case == "no head" else {})
    model = random_model(tower, replace(MU, **fields), CENTERED)
    theirs = loaded_by_open_clip(export(model, tmp_path / "out"))
    compare_texts(model, theirs)
    pooling_layer = model.config.pooling == "mean" or model.config.mask_padding
    assert len(theirs[0].text.transformer.resblocks) == 2 + pooling_layer


def test_logits_equal_ours(towers, tmp_path):
    import_package("open_clip")
    import torch

    model = random_model(towers("vit"), MU, FULL)
    theirs = loaded_by_open_clip(export(model, tmp_path / "out"))
    (pixels, images), (ids, texts) = compare_images(model, theirs, "vit"), compare_texts(model, theirs)
    with torch.no_grad():
        got = theirs[0].get_logits(pixels, ids)[0]
    want = np.exp(model.params["t"]) * images @ texts.T + model.params["b"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)  # a temperature of about 1


def test_logits_without_bias_equal_ours(towers, tmp_path):
    model = random_model(towers("vit"), MU, LossConfig(name="softmax"))
    folder = export(model, tmp_path / "out")
    assert loaded_by_open_clip(folder)[0].logit_bias is None
    assert "softmax over the texts" in (folder / "README.md").read_text()


def test_clip_benchmark_classifies_real_photos_as_ours(realdata, tmp_path):
    """Of a ViT-Ti/16 and photos of all sizes; the texts are those that our evaluation makes."""
    import_package("open_clip")
    torch = pytest.importorskip("torch")
    metric = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    from clip_benchmark.models.open_clip import load_open_clip

    flowers = realdata / "wds_tf_flowers"
    tower = load_tower(str(next((realdata / "vit").glob("*.npz"))), preprocess="pil-squash")
    with tarfile.open(flowers / "test" / "0.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in sorted(tar.getnames())[:80]}
    images = [
        Image.open(io.BytesIO(data)).convert("RGB") for name, data in files.items() if name.endswith("jpg")
    ]
    names = canonical_names((flowers / "classnames.txt").read_text().splitlines())
    lines = (flowers / "zeroshot_classification_templates.txt").read_text().splitlines()
    templates = canonical_templates(lines)[:3]

    model = random_model(tower, replace(MASKED, variant="Ti", depth=1), CENTERED)
    pixels = np.stack([tower.preprocess.apply(image) for image in images])
    features = np.asarray(jax.jit(tower.embed)(tower.params, pixels))
    model.params["mean"][:] = features.mean(axis=0)  # as in training, so that no class is everybody's nearest
    want = model.embed_features(features) @ classifier(names, templates, model.embed_text).T

    folder = export(model, tmp_path / "out")
    loaded, preprocess, tokenizer = load_open_clip(f"local-dir:{folder}", None)
    batch = torch.stack([preprocess(image) for image in images]), torch.zeros(len(images))
    loaded.eval()
    weights = metric.zero_shot_classifier(
        loaded, tokenizer, names, [t.replace("{}", "{c}") for t in templates], "cpu", amp=False
    )
    got, _ = metric.run_classification(loaded, weights, [batch], "cpu", amp=False)
    # run_classification multiplies by 100; cosines of float32, twelve layers deep.
    np.testing.assert_allclose(got / 100, want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got.argmax(dim=1), want.argmax(axis=1))
    assert len(set(want.argmax(axis=1))) > 2  # of five: there is something to agree on


@pytest.mark.parametrize(
    ("text", "preprocess", "message"),
    [
        ({"pooling": "map"}, {}, r"text\.pooling 'map'; export with --format lit_fast"),
        (
            {},
            {"method": "pil-crop", "resize": 40},
            r"resizes to 40 pixels and crops to \d+, which open_clip cannot",
        ),
        ({}, {"interpolation": "lanczos"}, "resizes with lanczos, open_clip only with bilinear or bicubic"),
    ],
)
def test_check_unsupported_pooling_or_preprocessing_raises(text, preprocess, message, towers):
    tower = towers("vit")
    tower = replace(tower, preprocess=replace(tower.preprocess, **preprocess))
    with pytest.raises(UserError, match=message) as error:
        target.check(random_model(tower, replace(MU, **text)), ExportOptions())
    assert "\n" not in str(error.value)
    if preprocess:  # pixels may differ, if one wants that
        target.check(random_model(tower, MU), ExportOptions(nearest_pixels=True))


def test_card_lists_the_differences(towers, tmp_path):
    tower = towers("vit")
    own = replace(tower.preprocess, method="pil-crop", resize=40, interpolation="lanczos", reduced=True)
    model = random_model(replace(tower, preprocess=own), replace(MU, dtype="bfloat16"))
    target.write(model, str(tmp_path), ExportOptions(nearest_pixels=True))
    card = (tmp_path / "README.md").read_text()
    for part in (
        "resized to 40", "resized with bicubic, for training with lanczos", "JPEGs are decoded at full size here",
        "stores features and computes this text tower in bfloat16", "`pip install open_clip_torch transformers timm`",
    ):  # fmt: skip
        assert part in card


@pytest.mark.parametrize("name", ["vit_giant_patch14_dinov2", "vit_base_patch16_siglip_224"])
def test_check_tower_without_timm_name_raises(name, tmp_path):
    tower = squashed(load_tower(str(write_timm(tmp_path / "tower", TIMM[name][0], name))))
    with pytest.raises(UserError, match=r"open_clip has no vision tower like this one.*export with"):
        target.check(random_model(tower, MU), ExportOptions())


def test_export_of_unsupported_model_writes_nothing(trained_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(trained_run), "--format", "open_clip", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "which open_clip cannot" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
