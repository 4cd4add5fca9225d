"""Tiny models of timm, open_clip and transformers with random weights, saved as their libraries publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.torch import save_file

from lit_fast.towers.interface import FrozenTower
from tests.torch_packages import import_package
from tests.weights.families import save_processor

SIZE = 32

# By family: architecture of timm and arguments that make it tiny.
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "eva02": ("eva02_tiny_patch14_224", {"depth": 1, "embed_dim": 48, "num_heads": 3, "patch_size": 8}),
    "naflex": ("naflexvit_base_patch16_gap", {"depth": 1, "embed_dim": 48, "num_heads": 3, "patch_size": 8}),
    "tiny_vit": (
        "tiny_vit_5m_224",
        {
            "embed_dims": (16, 24, 32, 48),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 3),
            "window_sizes": (4, 4, 2, 1),
        },
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}),
    "dinov3": ("vit_small_patch16_dinov3", {"depth": 1, "embed_dim": 48, "num_heads": 3, "patch_size": 8}),
    "pe": ("vit_pe_core_tiny_patch16_384", {"depth": 1, "embed_dim": 48, "num_heads": 3, "patch_size": 8}),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
    ),
    "beit": ("beit_base_patch16_224", {"depth": 1, "embed_dim": 48, "num_heads": 3, "patch_size": 8}),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
}

OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 48, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1},
}

SMALL = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "convnext": {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": SIZE},
    "beit": SMALL | {"image_size": SIZE, "patch_size": 8, "use_relative_position_bias": True},
    "dinov2": SMALL | {"image_size": SIZE, "patch_size": 8},
    "dinov3_vit": SMALL | {"image_size": SIZE, "patch_size": 8},
    "clip_vision_model": SMALL | {"image_size": SIZE, "patch_size": 8, "projection_dim": 24},
}


def shaken(model: Any) -> Any:
    """Return the model with noise on every weight and statistic, so that none is zero or one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                noise = 0.05 * torch.randn(value.shape, generator=generator)
                value.copy_(value + (noise.abs() if (value == 1).all() else noise))
    return model.eval().requires_grad_(False)


def save_timm(directory: Path, family: str, **more: Any) -> Any:
    """Save a model of `TIMM` as config.json and model.safetensors; return it."""
    timm = import_package("timm")
    name, arguments = TIMM[family]
    arguments = arguments | more
    if timm.get_pretrained_cfg(name).fixed_input_size:
        arguments = {"img_size": SIZE} | arguments
    model = shaken(timm.create_model(name, **({"num_classes": 0} | arguments)))
    data = {"input_size": (3, SIZE, SIZE), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    timm.models.save_for_hf(model, directory, model_args=arguments, data_config=data, safe_serialization=True)
    return model


def save_open_clip(directory: Path, **vision: Any) -> Any:
    """Save a model of open_clip as its configuration and open_clip_model.safetensors; return its vision tower."""
    open_clip = import_package("open_clip")
    config = OPEN_CLIP | {"vision_cfg": OPEN_CLIP["vision_cfg"] | vision}  # type: ignore[operator]
    model = shaken(open_clip.CLIP(**config))
    preprocess = {"size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    value = {"model_cfg": config, "preprocess_cfg": preprocess}
    (directory / "open_clip_config.json").write_text(json.dumps(value))
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, directory / "open_clip_model.safetensors")
    return model.visual


def save_transformers(directory: Path, kind: str) -> Any:
    """Save a model of `TRANSFORMERS` with its processor; return it."""
    transformers = import_package("transformers")
    config = transformers.AutoConfig.for_model(kind, **TRANSFORMERS[kind])
    bare = transformers.MODEL_MAPPING[type(config)]
    model = shaken(getattr(transformers, f"{bare.__name__}WithProjection", bare)(config))
    model.save_pretrained(directory)
    save_processor(directory, SIZE)
    return model


def save(directory: Path, case: str) -> Any:
    """Save the model of a case LIBRARY:NAME; return it."""
    library, _, name = case.partition(":")
    if library == "timm":
        return save_timm(directory, name)
    return save_open_clip(directory) if library == "open_clip" else save_transformers(directory, name)


def compiled(tower: FrozenTower, images: np.ndarray, dtype: Any = jnp.float32) -> np.ndarray:
    """The features float32 [n, width] of uint8 [n, size, size, 3] by JAX, compiled quickly."""
    program = jax.jit(lambda params, x: tower.embed(params, x, dtype)).lower(tower.params, images)
    run = program.compile({"xla_backend_optimization_level": 0})
    return np.asarray(run(tower.params, images))


def eager(tower: FrozenTower, model: Any, images: np.ndarray) -> np.ndarray:
    """The features float32 [n, width] of uint8 [n, size, size, 3] by PyTorch."""
    import torch

    mean, std = (np.asarray(v, np.float32) for v in (tower.preprocess.mean, tower.preprocess.std))
    x = torch.from_numpy((images.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = model(x)
    if isinstance(out, torch.Tensor):
        return out.numpy()
    if "image_embeds" in out:
        return out["image_embeds"].numpy()
    pooled = out["last_hidden_state"][:, 0] if out["last_hidden_state"].ndim == 3 else out["pooler_output"]
    return pooled.flatten(1).numpy()
