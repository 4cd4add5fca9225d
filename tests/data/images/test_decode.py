"""Image files to RGB: every format and mode, bombs, damage, reduced decoding."""

from __future__ import annotations

import io
import struct
import tarfile
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_fast.data.images.decode import ImageError, decode
from lit_fast.towers.preprocess import Preprocess
from tests.helpers import encoded, picture
from tests.towers.test_preprocess import PREPROCESSES

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]


@pytest.mark.parametrize("format", FORMATS)
def test_decode_formats(format: str) -> None:
    image = picture(1).quantize(256).convert("RGB") if format == "GIF" else picture(1)
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


def forms(photo: Image.Image) -> list[bytes]:
    """A photo in the forms in which pictures come from the web, all but JPEG without loss."""
    alpha = photo.convert("RGBA")
    alpha.putalpha(photo.convert("L"))
    grey = photo.convert("LA")
    grey.putalpha(photo.convert("L"))
    palette = photo.quantize(200)
    exif = Image.Exif()
    exif[0x0112] = 8
    jpegs = [photo, photo.convert("L"), photo.convert("CMYK")]
    return [
        *(encoded(image, "JPEG", progressive=p) for image in jpegs for p in (False, True)),
        encoded(photo, "JPEG", exif=exif, subsampling=0),
        *(encoded(image, "PNG") for image in (photo, alpha, grey, palette, photo.convert("1"))),
        encoded(palette, "PNG", transparency=5),
        encoded(palette, "PNG", transparency=bytes(range(200))),
        *(encoded(image, "WEBP", lossless=True) for image in (photo, alpha)),
        encoded(alpha, "WEBP", quality=60),
        *(encoded(image, "GIF") for image in (palette, photo.convert("L"))),
        *(encoded(image, "BMP") for image in (photo, palette, photo.convert("1"))),
    ]


def test_real_photos_decode_as_timm_and_torchvision_load_them(realdata: Path) -> None:
    """Both are `Image.open(file).convert("RGB")` (timm/data/dataset.py, torchvision/datasets/folder.py)."""
    with tarfile.open(realdata / "wds_tf_flowers" / "test" / "0.tar") as tar:
        names = [n for n in tar.getnames() if n.endswith(".jpg")][:3]
        files = [tar.extractfile(n).read() for n in names]  # type: ignore[union-attr]
    photos = [Image.open(io.BytesIO(f)).convert("RGB") for f in files]
    files += forms(photos[0]) + forms(photos[1].crop((3, 0, 120, 223))) + forms(photos[2].crop((0, 0, 1, 77)))
    for data in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(decode(data)), want)


@pytest.mark.parametrize("format", ["WEBP", "GIF", "MPO"])
def test_decode_takes_the_first_frame(format: str) -> None:
    frames = [picture(4).quantize(64).convert("RGB"), picture(5)]
    options = {"lossless": True} if format == "WEBP" else {}
    animated = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    got = np.asarray(decode(animated)).astype(int)
    # JPEG loses most at the edges that 64 colours make; the other frame is 60 levels away on average.
    assert np.abs(got - np.asarray(frames[0])).mean() < (8 if format == "MPO" else 1e-9)
    assert np.abs(got - np.asarray(frames[1])).mean() > 30


def test_decode_ignores_rotation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(
        np.asarray(decode(encoded(picture(4), exif=exif))), np.asarray(decode(encoded(picture(4))))
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_decode_drops_the_transparency_of_palettes(transparency: object) -> None:
    image = picture(2).convert("P")
    got = decode(encoded(image, "PNG", transparency=transparency))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(image.convert("RGB")))


def test_decode_takes_cmyk_as_inverted() -> None:
    # 1 - (c + k) per channel, whatever the table in between; PIL writes the Adobe marker and inverts.
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [0, 255, 255, 0]]], np.uint8)
    image = Image.fromarray(ink.repeat(16, 0).repeat(16, 1), "CMYK")
    data = encoded(image, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data
    got = np.asarray(decode(data))[8, 8::16]
    np.testing.assert_allclose(got, [[255, 255, 255], [0, 255, 255], [0, 0, 0], [255, 0, 0]], atol=6)


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "TGA"])
def test_decode_refuses_other_formats(format: str) -> None:
    with pytest.raises(ImageError, match="not a JPEG, PNG, WebP, GIF or BMP image"):
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


@pytest.mark.parametrize("format", FORMATS)
def test_decode_refuses_truncated_files(format: str) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)), format)
    for share in (0.0, 0.01, 0.3, 0.7, 0.95):
        with pytest.raises(ImageError):
            decode(data[: int(len(data) * share)])


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of a picture with further chunks after its header."""
    data = encoded(picture(1), "PNG")
    more = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return data[:33] + b"".join(more) + data[33:]


def test_decode_does_not_read_text_and_profiles_of_a_png() -> None:
    want = np.asarray(decode(encoded(picture(1), "PNG")))
    bomb = zlib.compress(b"\0" * 100_000_000, 9)
    starts = ((b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"))
    files = [png((kind, start + bomb)) for kind, start in starts]
    files += [png(*[(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 1_000_000))] * 80)]
    files += [png((b"tEXt", b"k\0" + b"a" * 3_000_000)), png((b"iCCP", b"damaged"), (b"eXIf", b"damaged"))]
    tracemalloc.start()
    try:
        for data in files:
            np.testing.assert_array_equal(np.asarray(decode(data)), want)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def many_scans(scans: int, side: int = 160) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(picture(1, side, side), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + b"\xff\xd9"


def test_decode_refuses_thousands_of_scans() -> None:
    assert decode(many_scans(50)).size == (160, 160)
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode(many_scans(1000))


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(content)) + content


SCANS = b"\xff\xda\x00\x08" * 200  # bytes that look like 200 scans
THUMBNAILS = many_scans(150, 16)
BESIDE_A_PICTURE = [
    segment(0xE1, b"Exif\0\0" + THUMBNAILS),
    segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + SCANS),
    segment(0xE2, b"ICC_PROFILE\0\1\1" + SCANS),
    segment(0xE2, b"MPF\0" + SCANS),
    segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1\xb0\1\0\4\0\0\0\1\0\0\0\x09\0\0\0\0"),
    segment(0xED, b"Photoshop 3.0\x008BIM" + SCANS),
    segment(0xFE, SCANS),
]


@pytest.mark.parametrize("progressive", [False, True])
def test_decode_counts_no_scans_beside_the_picture(progressive: bool) -> None:
    data = encoded(picture(1), "JPEG", progressive=progressive)
    want = np.asarray(decode(data))
    for beside in BESIDE_A_PICTURE:
        np.testing.assert_array_equal(np.asarray(decode(data[:2] + beside + data[2:])), want)
    for after in (THUMBNAILS, data * 150, SCANS, b"\0\0\0\x18ftypmp42" + SCANS):
        np.testing.assert_array_equal(np.asarray(decode(data + after)), want)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_decode_ignores_segments_and_bytes_after_the_end(data: st.DataObject) -> None:
    noise = st.binary(max_size=60) | st.sampled_from([SCANS, THUMBNAILS, b"\xff\xd9", b"\xff" * 9])
    heads = st.sampled_from([b"", b"Exif\0\0", b"MPF\0", b"ICC_PROFILE\0\1\1", b"Photoshop 3.0\x008BIM"])
    markers = st.sampled_from([0xE1, 0xE2, 0xE5, 0xED, 0xEF, 0xFE])
    segments = data.draw(
        st.lists(st.builds(lambda m, h, n: segment(m, h + n), markers, heads, noise), max_size=4)
    )
    # libjpeg reads metadata between scans, too.
    scans = data.draw(st.sampled_from([0, 90, 150]))
    file = many_scans(scans, 24)
    places = [2, file.index(b"\xff\xda"), file.rindex(b"\xff\xda")]
    at = data.draw(st.sampled_from(places))
    changed = file[:at] + b"".join(segments) + file[at:] + b"".join(data.draw(st.lists(noise, max_size=3)))
    if scans == 150:
        with pytest.raises(ImageError, match="more than 100 scans"):
            decode(changed)
    else:
        np.testing.assert_array_equal(np.asarray(decode(changed)), np.asarray(decode(file)))


@pytest.mark.parametrize(
    "hide", [b"\xff\x02", b"\xff\xbf", b"\xff\xd3", b"\xff\x01", b"\xff\xf0", b"\xff\xc8"]
)
def test_decode_counts_scans_behind_markers_without_a_length(hide: bytes) -> None:
    # If a length were read there, the scans behind it would be taken for the bytes of a segment.
    file = many_scans(150, 24)
    at = file.rindex(b"\xff\xda", 0, len(file) // 4)
    with pytest.raises(ImageError):
        decode(file[:at] + hide + b"\xff\xff" + file[at:])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("after", [b"\0", b"\0" * 5000, bytes(range(256)) * 9, SCANS])
def test_decode_ignores_what_follows_an_image(format: str, after: bytes) -> None:
    for more in ({}, {"save_all": True, "append_images": [picture(2)] * 40}):
        if format in ("PNG", "WEBP", "GIF") or not more:
            data = encoded(picture(1), format, **more)
            np.testing.assert_array_equal(np.asarray(decode(data + after)), np.asarray(decode(data)))


def test_decode_refuses_absurd_canvases() -> None:
    gif = bytearray(encoded(picture(1), "GIF"))
    gif[6:10] = b"\xff" * 4
    webp = bytearray(encoded(picture(1), "WEBP", save_all=True, append_images=[picture(2)]))
    webp[24:30] = b"\xff" * 6
    bmp = bytearray(encoded(picture(1), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, -60_000)
    for data in (gif, webp, bmp):
        with pytest.raises(ImageError, match="more than the limit"):
            decode(bytes(data))


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from([*FORMATS, "progressive", "animated"]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=12),
    st.integers(0, 10_000),
    st.sampled_from(PREPROCESSES),
)
def test_decode_of_any_bytes_returns_an_image_or_raises_image_error(
    format: str, changes: list[tuple[int, int]], length: int, how: Preprocess
) -> None:
    image = picture(7, 40, 33)
    if format == "progressive":
        data = bytearray(encoded(image, "JPEG", progressive=True))
    elif format == "animated":
        data = bytearray(encoded(image, "WEBP", save_all=True, append_images=[picture(8, 40, 33)]))
    else:
        data = bytearray(encoded(image, format))
    for position, value in changes:
        data[position % len(data)] = value
    if length < len(data):
        del data[length:]
    reason = ""
    try:
        image = decode(bytes(data), max_pixels=1_000_000, at_least=how.at_least)
        assert image.mode == "RGB"
        for number in (0, 1):
            got = how.view(image, "key", number)
            assert got.shape == (8, 8, 3)
            assert got.dtype == np.uint8
    except ImageError as error:
        reason = str(error)
    assert "0x" not in reason  # it is stored and must be the same each time
    assert "\n" not in reason


def test_reduced_decoding_keeps_what_is_needed() -> None:
    data = encoded(picture(1, 1000, 701), "JPEG")
    sizes = {n: decode(data, at_least=n).size for n in (800, 701, 351, 350, 176, 175, 87, 20)}
    assert sizes[800] == sizes[701] == sizes[351] == (1000, 701)
    assert sizes[350] == sizes[176] == (500, 351)
    assert sizes[175] == (250, 176)
    assert sizes[87] == sizes[20] == (125, 88)
    for format in ("PNG", "WEBP"):  # only libjpeg can
        assert decode(encoded(picture(1, 400, 400), format), at_least=20).size == (400, 400)


def test_reduced_decoding_is_close_and_in_place() -> None:
    # A smooth picture, so that what differs is where the pixels come from: an image put half a pixel off
    # by the odd sizes would differ by more than 2 levels at the edges.
    data = encoded(picture(1, 1001, 701), "JPEG", quality=95)
    for method in ("pil-crop", "hf-crop", "pil-squash"):
        how = Preprocess(method, 64, 71)
        reduced = Preprocess(method, 64, 71, reduced=True)
        assert (how.at_least, reduced.at_least) == (None, 142)
        exact, got = how.apply(decode(data)), reduced.apply(decode(data, at_least=reduced.at_least))
        assert np.abs(exact.astype(int) - got).max() <= 2
        assert not np.array_equal(exact, got)
