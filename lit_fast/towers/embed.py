"""A tower at work: from image files to features, on the devices of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from PIL import Image

from lit_fast.data.features import BFLOAT16
from lit_fast.data.images.decode import MAX_PIXELS, ImageError, decode, rgb
from lit_fast.errors import UserError
from lit_fast.runtime import AXIS, batch_sharding, make_mesh, replicated
from lit_fast.storage.files import exists, is_file, read_bytes, size
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.tower import Tower, load_tower
from lit_fast.utils.system import cpu_count

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
"""An image file, a PIL image, or its pixels uint8 [height, width, 3]."""

MAX_FILE = 256 << 20  # bytes


def open_tower(spec: str, options: dict[str, Any]) -> Tower:
    """The tower of a specification and of the options of `lit-fast embed` that change it.

    Those are `preprocess`, `resolution`, `gelu`, `pool` and `reduced_decode`; others are not its.

    Raises:
      UserError: as `load_tower`.
    """
    own = ("preprocess", "resolution", "gelu", "pool")
    tower = load_tower(spec, **{name: value for name, value in options.items() if name in own})
    if not options.get("reduced_decode"):
        return tower
    try:
        return replace(tower, preprocess=replace(tower.preprocess, reduced=True))
    except ValueError as error:
        raise UserError(f"tower {spec}: {error}") from None


def default_batch_size() -> int:
    """Images per device. On a CPU large batches are slow: 98 images/s by 16 and 32, 36 by 64 (ViT-Ti/16)."""
    return 16 if jax.default_backend() == "cpu" else 64


def compile_tower(tower: Tower, dtype: str) -> Callable[[np.ndarray], jax.Array]:
    """The tower over all local devices: uint8 `[n, size, size, 3]` to float32 `[n, width]`.

    `n` is a multiple of the number of devices. Each runs the same program on its own images, so that a
    vector depends on the images per device and not on the number of devices.
    """
    mesh = make_mesh(jax.local_devices())
    params = jax.device_put(tower.params, replicated(mesh))
    embed = jax.jit(
        jax.shard_map(
            lambda p, x: tower.embed(p, x, jnp.dtype(dtype)),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(AXIS),
            check_vma=False,
        )
    )
    split = batch_sharding(mesh)
    return lambda images: embed(params, jax.device_put(images, split))


def embed_images(
    run: Callable[[np.ndarray], jax.Array],
    images: Sequence[ImageLike],
    preprocess: Preprocess,
    width: int,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Features as `lit-fast embed` stores them, bfloat16 `[n, width]`.

    Args:
      run: the compiled tower.
      images: decoded batch by batch, in threads.
      preprocess: of the tower.
      width: of a feature.
      max_pixels: as `decode`.

    Raises:
      UserError: an image cannot be used; the message names the file, or the image's place.
    """
    batch = default_batch_size() * jax.local_device_count()
    side = preprocess.size
    out = np.empty((len(images), width), BFLOAT16)
    with ThreadPoolExecutor(cpu_count(), thread_name_prefix="decode") as pool:
        for lo in range(0, len(images), batch):
            part = range(lo, min(lo + batch, len(images)))
            pixels = np.zeros((batch, side, side, 3), np.uint8)
            for place, taken in enumerate(
                pool.map(lambda i: read_pixels(images[i], f"image {i}", preprocess, max_pixels), part)
            ):
                pixels[place] = taken
            out[part.start : part.stop] = np.asarray(run(pixels))[: len(part)].astype(BFLOAT16)
    return out


def read_pixels(
    image: ImageLike, name: str, preprocess: Preprocess, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """An image as the tower takes it, uint8 `[size, size, 3]`.

    Args:
      image: a file is treated as one of a dataset, see `decode`.
      name: of an image that is not a file, for messages.

    Raises:
      UserError: it cannot be used.
    """
    try:
        return preprocess.apply(_opened(image, preprocess, max_pixels))
    except (ImageError, OSError) as error:
        where = image if isinstance(image, str | os.PathLike) else name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{where} cannot be embedded: {reason}") from None


def _opened(image: ImageLike, preprocess: Preprocess, max_pixels: int) -> Image.Image:
    if isinstance(image, str | os.PathLike):
        if not is_file(image):  # a FIFO or a device would never end
            raise ImageError("it is a directory or a device" if exists(image) else "there is no such file")
        if size(image) > MAX_FILE:
            raise ImageError(f"the file is larger than {MAX_FILE >> 20} MiB")
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
