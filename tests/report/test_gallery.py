"""Thumbnails are small, bare and safe to make; strips take nothing for markup."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_fast.report.gallery import MAX_BYTES, SIDE, Figure, thumbnail
from lit_fast.report.page import render
from tests.helpers import encoded, picture

PREFIX = "data:image/jpeg;base64,"


def opened(source: str | None) -> Image.Image:
    assert source is not None
    assert source.startswith(PREFIX)
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix(PREFIX), validate=True)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_thumbnail_keeps_the_aspect_ratio_and_fits(width: int, height: int, format: str) -> None:
    small = opened(thumbnail(encoded(picture(0, width, height), format)))
    assert (small.format, small.mode) == ("JPEG", "RGB")
    if max(width, height) <= SIDE:
        assert small.size == (width, height)
        return
    assert max(small.size) == SIDE
    # Within a pixel, and never less than one.
    want = max(1.0, SIDE * min(width, height) / max(width, height))
    assert abs(min(small.size) - want) <= 1


def test_thumbnail_shows_the_picture() -> None:
    image = picture(3, 400, 300)
    small = np.asarray(opened(thumbnail(encoded(image, "PNG"))), np.float64)
    want = np.asarray(image.resize((SIDE, 96), Image.Resampling.BICUBIC), np.float64)
    # JPEG of quality 80 moves smooth pictures by about a grey level; colours are stored at half the size.
    assert np.abs(small - want).mean() < 3


def test_thumbnail_of_noise_respects_max_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    source = thumbnail(encoded(Image.fromarray(noise), "PNG"))
    assert source is not None
    assert len(base64.b64decode(source.removeprefix(PREFIX))) <= MAX_BYTES


def test_thumbnail_keeps_pixels_only() -> None:
    exif = Image.Exif()
    exif[0x010E] = "GEHEIM"  # ImageDescription
    file = encoded(picture(0), "JPEG", exif=exif, comment="GEHEIM", icc_profile=b"GEHEIM" * 20)
    assert file.count(b"GEHEIM") > 2
    source = thumbnail(file + b"GEHEIM<script>")
    assert source is not None
    data = base64.b64decode(source.removeprefix(PREFIX))
    assert b"GEHEIM" not in data
    assert b"Exif" not in data
    assert b"ICC_PROFILE" not in data


def test_thumbnail_of_transparent_pixels_is_white() -> None:
    small = opened(thumbnail(encoded(Image.new("RGBA", (20, 20), (255, 0, 0, 0)), "PNG")))
    assert np.asarray(small).min() >= 250


def bomb() -> bytes:
    """A PNG that says it has 60 000 x 60 000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [None, b"", b"<svg onload='alert(1)'/>", encoded(picture(0))[:200], bomb(), encoded(picture(0), "TIFF")],
    ids=["none", "empty", "svg", "truncated", "bomb", "tiff"],
)
def test_thumbnail_of_invalid_data_is_none(data: bytes | None) -> None:
    assert thumbnail(data) is None


class Texts(HTMLParser):
    """The texts and attributes of a page, with every element closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def search_page(figures: list[Figure], text: str = "") -> str:
    return render("search.html", title=text, note=text, sections=[(text, text, figures)])


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\r\x00", codec="utf-8"), min_size=1))
def test_page_with_hostile_texts_shows_them_as_text(text: str) -> None:
    hostile = text + "<script>'\"&amp;</p></ul>"
    figures = [Figure(PREFIX, hostile, "right"), Figure(None, hostile)]
    page = Texts(search_page(figures, hostile))
    assert "script" not in page.tags
    assert "".join(page.texts).count(hostile) == 7
    assert ("alt", hostile) in page.attributes
    assert {value for name, value in page.attributes if name == "src"} == {PREFIX}


def test_missing_picture_leaves_a_box() -> None:
    page = search_page([Figure(None)])
    assert "no picture" in page
    assert "<img" not in page
