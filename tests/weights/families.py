"""Models of transformers and timm with random weights, in which every parameter matters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lit_fast.towers.tower import Tower

# The configurations of the processors of the families; the pixels themselves are given to the models directly.
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def shaken(model: Any, seed: int = 0) -> Any:
    """Return the model with random parameters: kernels of usual size, biases, norms and scales far from 0 and 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1 and min(value.shape[-2:]) > 1:  # a kernel, positions
            noise *= 1.5 / value.shape[-1] ** 0.5 if "embed" not in name else 0.2
        else:
            noise *= 0.3
            scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma", "lambda1"))
            if scale or ("norm" in name and name.endswith("weight")):
                noise += 1
        value.data = noise
    return model.eval()


def save_processor(directory: Path, size: int) -> None:
    """preprocessor_config.json for images of `size` pixels."""
    value = PROCESSOR | {"size": {"height": size, "width": size}}
    (directory / "preprocessor_config.json").write_text(json.dumps(value))


def pixels(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Random uint8 images [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def normalized(images: np.ndarray) -> Any:
    """Images as the torch models take them: float32 [n, 3, size, size] in [-1, 1]."""
    import torch

    return torch.tensor(images).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)


def assert_same_features(tower: Tower, feature: Callable[[Any], Any], size: int) -> None:
    """The tower's features of random images are those of a torch model."""
    import torch

    images = pixels(3, size)
    with torch.no_grad():
        want = feature(normalized(images)).numpy()
    got = np.asarray(jax.jit(tower.embed)(tower.params, images))
    assert got.shape == want.shape == (3, tower.width)
    assert want.std() > 0.1
    # Two float32 computations of a few layers whose sums run in another order, outputs of about 1 to 5:
    # measured at most 2e-5.
    assert np.abs(got - want).max() < 1e-4
