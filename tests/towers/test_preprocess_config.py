"""Preprocessing from configurations, pixel for pixel against the families' own processors."""

from __future__ import annotations

import copy
import importlib
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_fast.data.images.decode import decode
from lit_fast.errors import UserError
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.preprocess_config import huggingface, open_clip, timm
from tests.helpers import picture
from tests.torch_packages import import_package

WHERE = Path("tower/preprocessor_config.json")
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

# As they stand beside published weights, old spellings and new ones.
CONFIGS: dict[str, dict[str, Any]] = {
    "vit, 2021": {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 2, "do_resize": True}
    | HALF,
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, "resample": 2},
    "vit, 384 bicubic": {"image_processor_type": "ViTImageProcessorFast", "size": 384, "resample": 3} | IMAGENET,
    "deit, 2021": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "resample": 3}
    | IMAGENET,
    "deit, 384": {"image_processor_type": "DeiTImageProcessor", "size": 438, "crop_size": 384, "do_center_crop": True},
    "deit, defaults": {"image_processor_type": "DeiTImageProcessor"},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 256, "width": 256}} | HALF,
    "clip, 2021": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3,
                   "do_center_crop": True, "do_normalize": True},
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336},
             "crop_size": {"height": 336, "width": 336}, "rescale_factor": 1 / 255},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "resample": 3,
               "crop_size": {"height": 224, "width": 224}, "do_center_crop": True} | IMAGENET,
    "beit": {"image_processor_type": "BeitImageProcessor", "size": {"height": 256, "width": 256}, "resample": 3,
             "crop_size": {"height": 224, "width": 224}, "do_center_crop": True} | HALF,
    "convnext": {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875, "resample": 3}
    | IMAGENET,
    "convnext, no fraction": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 160}},
    "convnext, 384": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "resample": 2},
    "odd crop": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 235}, "crop_size": 224},
    "padding": {"image_processor_type": "CLIPImageProcessor", "size": 201, "crop_size": 224},
    "squashed clip": {"image_processor_type": "CLIPImageProcessor", "size": [224, 224], "do_center_crop": False},
    "lanczos": {"image_processor_type": "ViTImageProcessor", "resample": 1},
    "not normalized": {"image_processor_type": "ViTImageProcessor", "do_normalize": False},
    "to [-1, 1] by scale": {"image_processor_type": "ViTImageProcessor", "rescale_factor": 1 / 127.5,
                            "image_mean": [1, 1, 1], "image_std": 1.0},
    "not rescaled": {"image_processor_type": "ViTImageProcessor", "do_rescale": False,
                     "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
}  # fmt: skip
SHAPES = [(500, 375), (375, 501), (224, 224), (301, 250), (90, 61), (257, 1031)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def photos(realdata: Path) -> list[Image.Image]:
    """Real photos, and oblong cuttings of them."""
    with tarfile.open(realdata / "wds_tf_flowers" / "test" / "0.tar") as tar:
        names = [n for n in tar.getnames() if n.endswith(".jpg")][:4]
        whole = [Image.open(io.BytesIO(tar.extractfile(n).read())).convert("RGB") for n in names]  # type: ignore[union-attr]
    return [*whole, whole[0].crop((0, 3, 224, 150)), whole[1].crop((7, 0, 98, 224)).resize((333, 777))]


def normalized(preprocess: Preprocess, image: Image.Image) -> np.ndarray:
    return (preprocess.apply(image) / 255.0 - np.array(preprocess.mean)) / np.array(preprocess.std)


def processor(config: dict[str, Any], **changes: Any) -> Any:
    """transformers' own, with PIL."""
    import_package("transformers")
    name = next(str(v) for k, v in config.items() if k.endswith("_type"))
    family = name.replace("FeatureExtractor", "").replace("Fast", "").replace("ImageProcessor", "")
    try:
        module = importlib.import_module(
            f"transformers.models.{family.lower()}.image_processing_pil_{family.lower()}"
        )
    except ImportError as error:
        pytest.skip(f"no PIL processors in this transformers: {error}")
    given = {k: v for k, v in config.items() if not k.endswith("_type")}
    return getattr(module, f"{family}ImageProcessorPil")(**(given | changes))


def test_dinov3_pixels_are_those_of_its_processor_rounded() -> None:
    """It resizes tensors of floats, antialiased, as PyTorch does; PIL rounds after each of both directions."""
    torch = pytest.importorskip("torch")
    # As published, with its empty keys.
    config = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 224, "width": 224},
              "resample": 2, "do_center_crop": None, "crop_size": None, "do_convert_rgb": None,
              "data_format": "channels_first", "default_to_square": True} | IMAGENET  # fmt: skip
    preprocess = huggingface(config, WHERE)
    assert preprocess == huggingface({"image_processor_type": "DINOv3ViTImageProcessor"}, WHERE)
    for shape in SHAPES:
        image = noise(*shape)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        want = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)[0]
        difference = np.abs(preprocess.apply(image) - want.permute(1, 2, 0).numpy())
        assert difference.max() <= 1.01
        assert difference.mean() < 0.35


@pytest.mark.parametrize("name", CONFIGS)
def test_huggingface_pixels_equal_transformers(name: str) -> None:
    config = copy.deepcopy(CONFIGS[name])
    preprocess = huggingface(config, WHERE)
    raw = processor(config, do_rescale=False, do_normalize=False)
    full = processor(config)
    for shape in SHAPES:
        image = noise(*shape)
        want = raw(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(preprocess.apply(image), want)
        # The same normalization, there in float32: values up to 255 with a relative error of 2**-23.
        want = full(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(
            normalized(preprocess, image), want, rtol=1e-6, atol=1e-6 * np.abs(want).max()
        )


@pytest.mark.parametrize("name", ["vit", "siglip", "clip", "dinov2", "deit, 2021"])
def test_huggingface_of_real_photos_equals_transformers(name: str, realdata: Path) -> None:
    config = CONFIGS[name]
    preprocess, raw = huggingface(config, WHERE), processor(config, do_rescale=False, do_normalize=False)
    for image in photos(realdata):
        want = raw(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(preprocess.apply(image), want)


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "1"])
def test_huggingface_of_every_image_mode_equals_transformers(name: str, mode: str) -> None:
    preprocess = huggingface(CONFIGS[name], WHERE)
    image = noise(300, 250)
    if "A" in mode or mode == "P":
        image.putalpha(noise(300, 250).convert("L"))
    options = {"transparency": 3} if mode == "P" else {}
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG" if mode == "CMYK" else "PNG", **options)
    raw = processor(CONFIGS[name], do_rescale=False, do_normalize=False)
    want = raw(Image.open(io.BytesIO(file.getvalue())), return_tensors="np")["pixel_values"][0]
    got = preprocess.apply(decode(file.getvalue(), alpha=preprocess.alpha))
    np.testing.assert_array_equal(got, want.transpose(1, 2, 0))


CFGS: dict[str, dict[str, Any]] = {
    "augreg": {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3},
    "384": {"input_size": [3, 384, 384], "crop_pct": 1.0, "crop_mode": "center", "std": [0.5] * 3},
    "dinov2": {"input_size": [3, 518, 518], "crop_pct": 1.0, "interpolation": "bicubic"},
    "odd crop": {"input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bilinear"},
    "squash": {"input_size": [3, 378, 378], "crop_pct": 1.0, "crop_mode": "squash"},
    "squash and odd crop": {"input_size": [3, 224, 224], "crop_pct": 0.95, "crop_mode": "squash"},
    "defaults": {"num_classes": 0},
}


@pytest.mark.parametrize("name", CFGS)
def test_timm_pixels_equal_timm(name: str) -> None:
    data = importlib.import_module(import_package("timm").__name__ + ".data")
    preprocess = timm(CFGS[name], WHERE)
    config = data.resolve_data_config(pretrained_cfg=CFGS[name])
    assert (preprocess.mean, preprocess.std) == (tuple(config["mean"]), tuple(config["std"]))
    transform = data.create_transform(**(config | {"mean": (0.0,) * 3, "std": (1.0,) * 3}))
    for shape in SHAPES:
        image = noise(*shape)
        want = np.round(transform(image).numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
        np.testing.assert_array_equal(preprocess.apply(image), want)


OPEN_CLIP: dict[str, dict[str, Any]] = {
    "clip": {},
    "siglip": {"size": [224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    "mobileclip": {"size": 96, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear"},
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_pixels_equal_open_clip(name: str) -> None:
    transforms = importlib.import_module(import_package("open_clip").__name__ + ".transform")
    preprocess = open_clip({"preprocess_cfg": OPEN_CLIP[name]}, WHERE)
    settings = transforms.PreprocessCfg(**OPEN_CLIP[name])
    assert (preprocess.mean, preprocess.std) == (tuple(settings.mean), tuple(settings.std))
    settings.mean, settings.std = (0.0,) * 3, (1.0,) * 3
    transform = transforms.image_transform_v2(settings, is_train=False)
    for shape in SHAPES:
        image = noise(*shape)
        want = np.round(transform(image).numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
        np.testing.assert_array_equal(preprocess.apply(image), want)


def test_timm_reads_every_vit_of_timm() -> None:
    import_package("timm")
    models = importlib.import_module("timm.models")
    understood = 0
    for name in models.list_pretrained(["vit_*", "deit*"]):
        config = vars(models.get_pretrained_cfg(name))
        try:
            preprocess = timm(config, WHERE)
        except UserError:
            assert config["input_size"][1] != config["input_size"][2], name
            continue
        assert preprocess.resize == math.floor(preprocess.size / config["crop_pct"])
        understood += 1
    assert understood > 200


def test_huggingface_and_timm_have_known_values() -> None:
    """Known results of configurations, for machines without transformers and timm."""
    assert huggingface(CONFIGS["vit, 2021"], WHERE) == Preprocess(
        "pil-squash", 224, 224, interpolation="bilinear"
    )
    assert huggingface(CONFIGS["deit, 384"], WHERE) == Preprocess("pil-squash", 384, 438)
    assert huggingface(CONFIGS["siglip"], WHERE) == Preprocess("pil-squash", 256, 256, alpha="white")
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert huggingface(CONFIGS["dinov2"], WHERE) == Preprocess("hf-crop", 224, 256, *imagenet, alpha="white")
    clip = huggingface(CONFIGS["clip, 2021"], WHERE)
    assert (clip.method, clip.size, clip.resize, clip.interpolation) == ("hf-crop", 224, 224, "bicubic")
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073)
    scaled = huggingface(CONFIGS["to [-1, 1] by scale"], WHERE)
    np.testing.assert_allclose((scaled.mean, scaled.std), 0.5, rtol=1e-12)
    assert timm(CFGS["augreg"], WHERE).resize == 248
    assert timm({}, WHERE) == Preprocess("pil-crop", 224, 256, *imagenet)


def test_hf_crop_rounds_its_corner_down() -> None:
    image = picture(1, 35, 32)  # 3 columns too many: 1 goes at the left, torchvision takes 2
    np.testing.assert_array_equal(Preprocess("hf-crop", 32, 32).apply(image), np.asarray(image)[:, 1:33])
    np.testing.assert_array_equal(Preprocess("pil-crop", 32, 32).apply(image), np.asarray(image)[:, 2:34])


def test_hf_crop_of_a_smaller_image_is_padded_with_black() -> None:
    image = noise(40, 30)
    got = Preprocess("hf-crop", 37, 30).apply(image)
    want = np.zeros((37, 37, 3), np.uint8)
    want[4:34] = np.asarray(image)[:, 1:38]
    np.testing.assert_array_equal(got, want)


BAD: list[dict[str, Any]] = [
    {"image_processor_type": "Siglip2ImageProcessor"},
    {"image_processor_type": "VivitImageProcessorFast"},
    {"image_processor_type": ["ViTImageProcessor"]},
    {"image_processor_type": "ImageProcessor"},
    {"image_processor_type": ""},
    {"do_resize": False},
    {"do_pad": True},
    {"size": {"shortest_edge": 224}},
    {"size": {"shortest_edge": 224, "longest_edge": 400}},
    {"size": {"height": 224, "width": 256}},
    {"size": {"max_height": 224, "max_width": 224}},
    {"size": "224"},
    {"size": []},
    {"size": 224.5},
    {"size": -1},
    {"size": 10**12},
    {"size": True},
    {"size": 225, "do_center_crop": True, "crop_size": 222},
    {"size": 200, "do_center_crop": True, "crop_size": 224},
    {"do_center_crop": True},
    {"do_center_crop": True, "crop_size": {"shortest_edge": 224}},
    {"resample": 9},
    {"resample": "bicubic"},
    {"rescale_factor": 0},
    {"rescale_factor": math.nan},
    {"image_mean": [0.5, 0.5]},
    {"image_std": [0.5, 0.5, 0]},
    {"image_std": "half"},
    {"image_mean": [math.inf] * 3},
]


@pytest.mark.parametrize("change", BAD, ids=json.dumps)
def test_huggingface_of_other_transforms_is_refused_in_one_line(change: dict[str, Any]) -> None:
    good = {"image_processor_type": "ViTImageProcessor"}
    huggingface(good, WHERE)
    with pytest.raises(UserError, match=r"^tower/preprocessor_config\.json: .*give --preprocess$"):
        huggingface(good | change, WHERE)


@pytest.mark.parametrize(
    "change",
    [
        {"crop_mode": "border"},
        {"input_size": [3, 1024, 768]},
        {"input_size": [1, 224, 224]},
        {"input_size": 224},
        {"input_size": [3, "a", "a"]},
        {"crop_pct": 1.5},
        {"crop_pct": 1e-9},
        {"crop_pct": "0.9"},
        {"interpolation": "random"},
        {"interpolation": 3},
        {"interpolation": ["bicubic"]},
        {"mean": [0.5]},
        {"std": [0.0, 0.5, 0.5]},
    ],
    ids=str,
)
def test_timm_of_other_transforms_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"give --preprocess$"):
        timm(CFGS["augreg"] | change, WHERE)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["height", "width", "shortest_edge", "longest_edge"]), inner, max_size=2
        )
    ),
    max_leaves=6,
)
KEYS = ["size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "rescale_factor",
        "do_rescale", "do_normalize", "do_pad", "do_resize", "image_processor_type", "input_size", "crop_pct",
        "crop_mode", "interpolation", "mean", "std"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(CONFIGS.values())), st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=4))
def test_huggingface_of_any_configuration_reads_or_refuses(
    config: dict[str, Any], changes: dict[str, Any]
) -> None:
    for read in (huggingface, timm):
        try:
            preprocess = read(config | changes, WHERE)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert preprocess.apply(picture(1, 12, 10)).shape == (preprocess.size, preprocess.size, 3)
