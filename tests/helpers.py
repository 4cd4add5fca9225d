"""Small real inputs for tests: pictures, tars, a tower."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth random RGB image."""
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tar_bytes(members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of regular files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """`tar_bytes` in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, format))
    return path


def samples(count: int, first: int = 0, captions: int = 2, **size: int) -> list[tuple[str, bytes]]:
    """Members of `count` rows as img2dataset writes them: a picture, the first caption, JSON with all."""
    members = []
    for i in range(first, first + count):
        texts = [f"picture {i}, caption {j}" for j in range(captions)]
        value = {"caption": texts[0], "captions": texts, "width": 48, "status": "success"}
        members += [
            (f"{i:09d}.jpg", encoded(picture(i, **size))),
            (f"{i:09d}.txt", texts[0].encode()),
            (f"{i:09d}.json", json.dumps(value).encode()),
        ]
    return members


def tiny_vit_arrays(
    width: int = 32, depth: int = 2, heads: int = 2, patch: int = 8, size: int = 32, classes: int = 10
) -> dict[str, np.ndarray]:
    """Random weights of a ViT under AugReg's names."""
    rng = np.random.default_rng(0)

    def kernel(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.1, shape).astype(np.float32)

    arrays = {
        "embedding/kernel": kernel(patch, patch, 3, width),
        "embedding/bias": kernel(width),
        "cls": kernel(1, 1, width),
        "Transformer/posembed_input/pos_embedding": kernel(1, (size // patch) ** 2 + 1, width),
        "Transformer/encoder_norm/scale": 1 + kernel(width),
        "Transformer/encoder_norm/bias": kernel(width),
        "head/kernel": kernel(width, classes),
        "head/bias": kernel(classes),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            arrays[f"{attention}/{name}/kernel"] = kernel(width, heads, width // heads)
            arrays[f"{attention}/{name}/bias"] = kernel(heads, width // heads)
        arrays[f"{attention}/out/kernel"] = kernel(heads, width // heads, width)
        arrays[f"{attention}/out/bias"] = kernel(width)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays[f"{block}/{norm}/scale"] = 1 + kernel(width)
            arrays[f"{block}/{norm}/bias"] = kernel(width)
        arrays[f"{block}/MlpBlock_3/Dense_0/kernel"] = kernel(width, 4 * width)
        arrays[f"{block}/MlpBlock_3/Dense_0/bias"] = kernel(4 * width)
        arrays[f"{block}/MlpBlock_3/Dense_1/kernel"] = kernel(4 * width, width)
        arrays[f"{block}/MlpBlock_3/Dense_1/bias"] = kernel(width)
    return arrays
