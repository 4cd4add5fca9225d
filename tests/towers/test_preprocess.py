"""Resizing conventions, their provenance, and views."""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_fast.data.images.decode import ImageError
from lit_fast.towers.preprocess import Preprocess, random_crop, tf_squash
from tests.helpers import picture

PREPROCESSES = [
    Preprocess("pil-crop", 8, 9),
    Preprocess("pil-squash", 8, 8, interpolation="bilinear"),
    Preprocess("hf-crop", 8, 7),
    Preprocess("tf-squash", 8, 8),
    Preprocess("hf-crop", 8, 8, reduced=True),
]


def squash_reference(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, half-pixel centres, no antialias, in float64 and pixel by pixel."""
    height, width, channels = image.shape
    out = np.empty((size, size, channels))
    for i in range(size):
        y = (i + 0.5) * height / size - 0.5
        y0, y1 = max(math.floor(y), 0), min(math.ceil(y), height - 1)
        for j in range(size):
            x = (j + 0.5) * width / size - 0.5
            x0, x1 = max(math.floor(x), 0), min(math.ceil(x), width - 1)
            fy, fx = y - math.floor(y), x - math.floor(x)
            p = image.astype(np.float64)
            upper = p[y0, x0] * (1 - fx) + p[y0, x1] * fx
            lower = p[y1, x0] * (1 - fx) + p[y1, x1] * fx
            out[i, j] = upper * (1 - fy) + lower * fy
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_tf_squash_is_bilinear_without_antialias(height: int, width: int, size: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    exact = squash_reference(image, size)
    got = tf_squash(image, size)
    assert got.dtype == np.uint8
    # Truncated, so the result lies in (exact - 1, exact], but for float32 rounding at whole numbers.
    assert np.all(got <= exact + 1e-3)
    assert np.all(got > exact - 1 - 1e-3)


def test_tf_squash_has_known_values() -> None:
    ramp = np.array([0, 10, 20, 30], np.uint8)[None, :, None].repeat(4, 0)
    np.testing.assert_array_equal(tf_squash(ramp, 2)[..., 0], [[5, 25], [5, 25]])
    # 0.75 and 7.5 steps: truncated where rounding would give 3, 8, 18.
    up = tf_squash(np.array([[0, 10], [0, 10]], np.uint8)[..., None], 4)
    np.testing.assert_array_equal(up[0, :, 0], [0, 2, 7, 10])


def test_tf_squash_of_an_image_of_that_size_changes_nothing() -> None:
    image = np.asarray(picture(0, 32, 32))
    assert tf_squash(image, 32) is image


@pytest.mark.parametrize(
    ("shape", "crc"), [((500, 375), 0xC4FFA252), ((375, 501), 0xF32084BB), ((61, 90), 0xCD4B5156)]
)
def test_pil_crop_has_known_values(shape: tuple[int, int], crc: int) -> None:
    """Checksums of what timm 1.0.31's transform returns (crop_pct 0.9, bicubic)."""
    y, x, c = np.mgrid[: shape[1], : shape[0], :3]
    image = Image.fromarray(((x * x * 3 + y * y * 7 + x * y * (c + 1)) % 256).astype(np.uint8))
    assert zlib.crc32(Preprocess("pil-crop", 224, 248).apply(image).tobytes()) == crc


def test_pil_crop_of_an_image_of_that_size_does_not_resample() -> None:
    image = picture(3, 40, 32)
    got = Preprocess("pil-crop", 28, 32).apply(image)
    np.testing.assert_array_equal(got, np.asarray(image)[2:30, 6:34])


def test_pil_crop_of_a_very_thin_image_is_refused() -> None:
    with pytest.raises(ImageError, match="long and thin"):
        Preprocess("pil-crop", 224, 248).apply(Image.new("RGB", (1, 30_000)))


SENSE = {"method": "pil-crop", "size": 224, "resize": 248}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "lanczos"}, "pil-crop, pil-squash, hf-crop, tf-squash"),
        ({"resize": 200}, "smaller than size"),
        ({"method": "pil-squash", "resize": 200}, "smaller than size"),
        ({"size": 0}, "size is 0"),
        ({"size": 224.0}, "size is 224.0"),
        ({"size": True}, "size is True"),
        ({"resize": 10**9}, "resize is 1000000000"),
        ({"interpolation": "cubic"}, "choose from nearest"),
        ({"method": "tf-squash", "interpolation": "bicubic"}, "tf-squash is bilinear"),
        ({"method": "tf-squash", "reduced": True}, "reduced"),
        ({"mean": (0.5, 0.5)}, "mean is"),
        ({"std": (0.5, 0.5, 0.0)}, "std is"),
        ({"std": (0.5, 0.5, math.nan)}, "std is"),
    ],
)
def test_preprocess_with_invalid_values_is_refused(change: dict[str, Any], match: str) -> None:
    Preprocess(**SENSE)
    with pytest.raises(ValueError, match=match) as caught:
        Preprocess(**(SENSE | change))
    assert "\n" not in str(caught.value)


def test_preprocess_to_and_from_json_is_equal() -> None:
    preprocess = Preprocess("tf-squash", 224, 248)
    assert preprocess == Preprocess("tf-squash", 224, 224)  # one meaning, one spelling
    assert preprocess == Preprocess("tf-squash", 224, 224, interpolation="bilinear")
    for preprocess in (
        *PREPROCESSES,
        Preprocess("pil-crop", 8, 9, interpolation="lanczos", std=(1.0, 2.0, 3.0)),
    ):
        assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


def test_to_dict_of_defaults_has_no_optional_fields() -> None:
    """Identities of towers digest this; features made before there were more fields stay valid."""
    rest = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    crop = {"method": "pil-crop", "size": 224, "resize": 248} | rest
    squash = {"method": "tf-squash", "size": 224, "resize": 224} | rest
    assert Preprocess("pil-crop", 224, 248).to_dict() == crop
    assert Preprocess("tf-squash", 224, 248).to_dict() == squash
    assert Preprocess.from_dict(crop) == Preprocess("pil-crop", 224, 248)
    assert Preprocess.from_dict(squash) == Preprocess("tf-squash", 224, 224)
    other = Preprocess("pil-crop", 224, 248, interpolation="bilinear", reduced=True).to_dict()
    assert other == crop | {"interpolation": "bilinear", "reduced": True}


def test_view_0_equals_apply() -> None:
    image = picture(1, 90, 61)
    for preprocess in PREPROCESSES:
        np.testing.assert_array_equal(preprocess.view(image, "k", 0), preprocess.apply(image))


def test_view_equals_its_resized_crop() -> None:
    image = picture(1, 90, 61)
    crops = {(key, n): random_crop(90, 61, key, n) for key in ("a", "b") for n in (1, 2)}
    # Pinned: stored views must be drawn again the same, on any machine.
    assert crops == {
        ("a", 1): (1, 7, 51, 57),
        ("a", 2): (9, 0, 75, 56),
        ("b", 1): (3, 9, 58, 61),
        ("b", 2): (5, 0, 78, 59),
    }
    preprocess = Preprocess("pil-squash", 32, 32, interpolation="bilinear")
    for (key, n), box in crops.items():
        want = image.crop(box).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(preprocess.view(image, key, n), np.asarray(want))
    squash = Preprocess("tf-squash", 32, 32).view(image, "a", 1)
    np.testing.assert_array_equal(squash, tf_squash(np.asarray(image.crop(crops["a", 1])), 32))


@given(st.integers(1, 3000), st.integers(1, 3000), st.text(max_size=20), st.integers(1, 1000))
def test_random_crop_is_inside_the_image(width: int, height: int, key: str, number: int) -> None:
    left, top, right, bottom = random_crop(width, height, key, number)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    # Sides are rounded to whole pixels, so by up to half of one.
    assert (w - 0.5) / (h + 0.5) <= 4 / 3
    assert (h - 0.5) / (w + 0.5) <= 4 / 3
    if 4 / 3 >= width / height >= 3 / 4 and min(width, height) >= 100:  # else the whole may be too long
        assert (w + 1) * (h + 1) >= 0.35 * width * height


def test_random_crops_cover_the_image() -> None:
    boxes = np.array([random_crop(400, 300, "key", n) for n in range(1, 2001)], float)
    left, top, right, bottom = boxes.T
    share = (right - left) * (bottom - top) / 120_000
    # The definition, drawn by another generator: uniform shares and ratios, of which those that fit count.
    rng = np.random.default_rng(0)
    area, ratio = rng.uniform(0.35, 1, 100_000), rng.uniform(1, 4 / 3, 100_000)
    ratio = np.where(rng.random(100_000) < 0.5, ratio, 1 / ratio)
    fits = (120_000 * area * ratio <= 400**2) & (120_000 * area / ratio <= 300**2)
    # Five standard errors of 2000 draws.
    assert abs(share.mean() - area[fits].mean()) < 5 * area[fits].std() / 2000**0.5
    assert 0.34 < share.min() < 0.37
    assert share.max() > 0.95
    for low, high, whole in ((left, right, 400), (top, bottom, 300)):
        centre = (low + high) / 2 - whole / 2
        assert abs(centre.mean()) < 5 * centre.std() / 2000**0.5 + 0.5  # corners are rounded down
    assert len(np.unique(boxes, axis=0)) > 1900
    # Of a square picture as many are wide as tall.
    square = np.array([random_crop(400, 400, "key", n) for n in range(1, 2001)])
    wide = np.sign((square[:, 2] - square[:, 0]) - (square[:, 3] - square[:, 1]))
    assert abs(wide.mean()) < 5 / 2000**0.5
