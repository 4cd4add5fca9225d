"""Compute features of images with a tower, on the devices of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lit_fast.data.features import BFLOAT16
from lit_fast.data.images.decode import MAX_PIXELS, ImageError, decode, rgb
from lit_fast.errors import UserError, os_reason
from lit_fast.runtime import REPLICATED, SHARDED, batch_sharding, make_mesh, replicated, shard_map
from lit_fast.storage.files import exists, is_file, read_bytes, read_whole, size
from lit_fast.storage.machine import cpu_count
from lit_fast.storage.paths import is_url
from lit_fast.towers.interface import FrozenTower
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.tower import load_tower

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
"""An image file, a PIL image, or its pixels uint8 [height, width, 3]."""

_MAX_FILE = 256 << 20  # bytes


def open_tower(spec: str, options: dict[str, Any]) -> FrozenTower:
    """Load a tower with those options of `lit-fast embed` that affect it.

    They are `preprocess`, `resolution`, `gelu`, `pool`, `backend`, `arch` and `reduced_decode`; others are ignored.

    Raises:
      UserError: as `load_tower`.
    """
    names = ("preprocess", "resolution", "gelu", "pool", "backend", "arch")
    tower = load_tower(spec, **{name: value for name, value in options.items() if name in names})
    if not options.get("reduced_decode"):
        return tower
    try:
        return replace(tower, preprocess=replace(tower.preprocess, reduced=True))
    except ValueError as error:
        raise UserError(f"tower {spec}: {error}") from None


def default_batch_size() -> int:
    """Return the images per device.

    On CPUs large batches are slow: ViT-Ti/16 embeds 98 images/s in batches of 16 or 32, 36 images/s in batches of 64.
    """
    return 16 if jax.default_backend() == "cpu" else 64


def compile_tower(tower: FrozenTower, dtype: str) -> Callable[[np.ndarray], jax.Array]:
    """Compile a tower for all local devices.

    Each device runs the same program on its own images, so that a feature depends on the images per device and not on
    the number of devices.

    Returns:
      A function of uint8 [n, size, size, 3] to float32 [n, width], where n is a multiple of the number of devices.
    """
    mesh = make_mesh(jax.local_devices())
    params = jax.device_put(tower.params, replicated(mesh))
    function = shard_map(
        lambda p, x: tower.embed(p, x, jnp.dtype(dtype)), mesh, (REPLICATED, SHARDED), out_specs=SHARDED
    )
    embed = jax.jit(function)
    sharding = batch_sharding(mesh)
    return lambda images: embed(params, jax.device_put(images, sharding))


def embed_images(
    run: Callable[[np.ndarray], jax.Array],
    images: Sequence[ImageLike],
    preprocess: Preprocess,
    width: int,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Embed images as `lit-fast embed` does.

    Args:
      run: the result of `compile_tower`.
      images: decoded batch by batch, in threads.
      preprocess: that of the tower.
      width: length of a feature.
      max_pixels: see `decode`.

    Returns:
      bfloat16 [n, width].

    Raises:
      UserError: an image cannot be used; the message names the file or the position of the image.
    """
    batch = default_batch_size() * jax.local_device_count()
    side = preprocess.size
    out = np.empty((len(images), width), BFLOAT16)
    with ThreadPoolExecutor(cpu_count(), thread_name_prefix="decode") as pool:
        for lo in range(0, len(images), batch):
            part = range(lo, min(lo + batch, len(images)))
            pixels = np.zeros((batch, side, side, 3), np.uint8)
            decoded = pool.map(lambda i: read_pixels(images[i], f"image {i}", preprocess, max_pixels), part)
            for position, image in enumerate(decoded):
                pixels[position] = image
            out[part.start : part.stop] = np.asarray(run(pixels))[: len(part)].astype(BFLOAT16)
    return out


def read_pixels(
    image: ImageLike, name: str, preprocess: Preprocess, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode and preprocess one image.

    Args:
      image: a file is decoded as one of a dataset, see `decode`.
      name: for messages, if the image is not a file.
      preprocess: that of the tower.
      max_pixels: see `decode`.

    Returns:
      uint8 [size, size, 3].

    Raises:
      UserError: the image cannot be used.
    """
    try:
        return preprocess.apply(_open_image(image, preprocess, max_pixels))
    except (ImageError, OSError) as error:
        where = image if isinstance(image, str | os.PathLike) else name
        reason = os_reason(error) if isinstance(error, OSError) else error
        raise UserError(f"{where} cannot be embedded: {reason}; give another image") from None


def _open_image(image: ImageLike, preprocess: Preprocess, max_pixels: int) -> Image.Image:
    if isinstance(image, str | os.PathLike) and is_url(image):
        found = read_whole(image, _MAX_FILE)
        if found is None:
            raise ImageError("there is no such file")
        return decode(found, max_pixels=max_pixels, at_least=preprocess.at_least, alpha=preprocess.alpha)
    if isinstance(image, str | os.PathLike):
        if not is_file(image):  # a pipe or a device might never end
            raise ImageError("it is a directory or a device" if exists(image) else "there is no such file")
        if size(image) > _MAX_FILE:
            raise ImageError(f"the file is larger than {_MAX_FILE >> 20} MiB")
        data = read_bytes(image)
        return decode(data, max_pixels=max_pixels, at_least=preprocess.at_least, alpha=preprocess.alpha)
    if isinstance(image, Image.Image):
        try:
            return rgb(image.copy(), preprocess.alpha)
        except Exception as error:  # PIL reads the file only now; as in `decode`
            raise ImageError(f"damaged image: {' '.join(str(error).split())[:100]}") from None
    if not isinstance(image, np.ndarray):
        raise ImageError(f"a path, a PIL image or a uint8 array is needed, not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ImageError(f"an array must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
    return Image.fromarray(np.ascontiguousarray(image))
