"""Decoding and the two resizing conventions."""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_fast.preprocess import ImageError, Preprocess, decode, tf_squash
from tests.helpers import encoded, picture


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


def test_tf_squash_known_values() -> None:
    ramp = np.array([0, 10, 20, 30], np.uint8)[None, :, None].repeat(4, 0)
    np.testing.assert_array_equal(tf_squash(ramp, 2)[..., 0], [[5, 25], [5, 25]])
    # 0.75 and 7.5 steps: truncated where rounding would give 3, 8, 18.
    up = tf_squash(np.array([[0, 10], [0, 10]], np.uint8)[..., None], 4)
    np.testing.assert_array_equal(up[0, :, 0], [0, 2, 7, 10])


def test_tf_squash_leaves_an_image_of_the_size_alone() -> None:
    image = np.asarray(picture(0, 32, 32))
    assert tf_squash(image, 32) is image


SHAPES = [(500, 375), (375, 500), (224, 224), (248, 248), (248, 331), (301, 250), (90, 61)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pil_crop_is_timms_transform(shape: tuple[int, int]) -> None:
    try:
        from timm.data import create_transform
    except Exception as error:  # a torchvision of another torch raises RuntimeError
        pytest.skip(f"timm.data cannot be imported: {error}")
    zero, one = (0.0,) * 3, (1.0,) * 3
    transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.9, mean=zero, std=one)
    noise = np.random.default_rng(1).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    image = Image.fromarray(noise)
    want = np.round(transform(image).numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
    np.testing.assert_array_equal(Preprocess("pil-crop", 224, 248).apply(image), want)


@pytest.mark.parametrize(
    ("shape", "crc"), [((500, 375), 0xC4FFA252), ((375, 501), 0xF32084BB), ((61, 90), 0xCD4B5156)]
)
def test_pil_crop_check_values(shape: tuple[int, int], crc: int) -> None:
    """Checksums of what timm 1.0.31's transform returns (crop_pct 0.9, bicubic)."""
    y, x, c = np.mgrid[: shape[1], : shape[0], :3]
    image = Image.fromarray(((x * x * 3 + y * y * 7 + x * y * (c + 1)) % 256).astype(np.uint8))
    assert zlib.crc32(Preprocess("pil-crop", 224, 248).apply(image).tobytes()) == crc


def test_pil_crop_does_not_resample_at_the_right_size() -> None:
    image = picture(3, 40, 32)
    got = Preprocess("pil-crop", 28, 32).apply(image)
    np.testing.assert_array_equal(got, np.asarray(image)[2:30, 6:34])


def test_pil_crop_refuses_a_thread_of_pixels() -> None:
    with pytest.raises(ImageError, match="long and thin"):
        Preprocess("pil-crop", 224, 248).apply(Image.new("RGB", (1, 30_000)))


def test_preprocess_refuses_nonsense_and_survives_json() -> None:
    with pytest.raises(ValueError, match="pil-crop"):
        Preprocess("lanczos", 224, 248)
    with pytest.raises(ValueError, match="smaller"):
        Preprocess("pil-crop", 224, 200)
    how = Preprocess("tf-squash", 224, 248)
    assert how == Preprocess("tf-squash", 224, 224)  # one meaning, one spelling
    assert Preprocess.from_dict(how.to_dict()) == how


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_decode_formats(format: str) -> None:
    image = picture(1)
    options = {"lossless": True} if format == "WEBP" else {}
    got = decode(encoded(image, format, **options))
    assert got.mode == "RGB"
    assert np.abs(np.asarray(got).astype(int) - np.asarray(image)).max() <= (25 if format == "JPEG" else 0)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1"])
def test_decode_modes_as_pil_converts_them(mode: str) -> None:
    image = picture(2).convert(mode)
    got = decode(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert got.mode == "RGB"
    if mode != "CMYK":
        np.testing.assert_array_equal(np.asarray(got), np.asarray(image.convert("RGB")))
    else:
        assert np.abs(np.asarray(got).astype(int) - np.asarray(image.convert("RGB"))).max() < 30


def test_decode_scales_16_bits() -> None:
    grey = np.array([[0, 257, 256, 32_896, 65_535]], np.uint16)
    got = np.asarray(decode(encoded(Image.fromarray(grey), "PNG")))
    np.testing.assert_array_equal(got[0, :, 0], [0, 1, 1, 128, 255])


def test_decode_takes_the_first_frame_and_ignores_rotation() -> None:
    frames = [picture(4), picture(5)]
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(np.asarray(decode(animated)), np.asarray(frames[0]))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(picture(4), exif=exif)).size == (48, 40)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_decode_refuses_other_formats(format: str) -> None:
    with pytest.raises(ImageError, match="not a JPEG, PNG or WebP"):
        decode(encoded(picture(1), format))


def bomb(side: int) -> bytes:
    """A PNG that says it has side x side pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9_000, 60_000, 2**31 - 1])
def test_decode_refuses_bombs_by_their_header(side: int) -> None:
    with pytest.raises(ImageError, match="more than the limit"):
        decode(bomb(side))


def test_decode_limit_is_inclusive() -> None:
    data = encoded(picture(1))
    assert decode(data, max_pixels=48 * 40).size == (48, 40)
    with pytest.raises(ImageError, match="48 x 40 pixels"):
        decode(data, max_pixels=48 * 40 - 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_decode_refuses_truncated_files(format: str) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)), format)
    for share in (0.0, 0.01, 0.3, 0.7, 0.95):
        with pytest.raises(ImageError):
            decode(data[: int(len(data) * share)])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP"]), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)))
)
def test_decode_never_fails_otherwise(format: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(picture(7, 16, 16), format))
    for place, value in changes:
        data[place % len(data)] = value
    reason = ""
    try:
        assert decode(bytes(data), max_pixels=1_000_000).mode == "RGB"
    except ImageError as error:
        reason = str(error)
    assert "0x" not in reason  # it is stored and must be the same each time
