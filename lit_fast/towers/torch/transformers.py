"""Build vision models of transformers from `config.json` and tensors. No code of a repository is run."""

from __future__ import annotations

import re
from typing import Any

from lit_fast.errors import UserError, first_line
from lit_fast.storage.files import local_path
from lit_fast.storage.paths import parent
from lit_fast.towers.torch.packages import package_version, require
from lit_fast.towers.torch.tower import Body

POOLS = ("tok", "gap", "pooler", "projection")

# Settings of a configuration that name code, other weights or kernels, or only describe labels.
_DROPPED = re.compile(
    r"_.*|auto_map|transformers_version|torch_dtype|dtype|quantization_config|id2label|label2id|architectures|task_\w+"
    r"|.*attn_implementation.*|experts_implementation|use_timm_backbone|use_pretrained_backbone|backbone\w*"
)
_POOLERS_OF_TRAINING = (
    "vit",
    "deit",
    "beit",
    "data2vec-vision",
    "dinov2",
    "dinov2_with_registers",
    "vit_mae",
)


def recipe(config: dict[str, Any], where: str, pool: str | None, resolution: int | None) -> dict[str, Any]:
    """Return the recipe of a vision model, see `build`.

    Args:
      config: content of `config.json`; of a model of images and texts, its `vision_config` is used.
      where: its path, for messages.
      pool: one of `POOLS`, None for the model's own.
      resolution: pixels, None for the model's own.

    Raises:
      UserError: the configuration names no vision model, or there is no such pooling.
    """
    transformers = require("transformers")
    kind, settings, projection = config.get("model_type"), config, None
    if isinstance(config.get("vision_config"), dict):
        settings, projection = config["vision_config"], config.get("projection_dim")
        kind = settings.get("model_type") or f"{kind}_vision_model"
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{where}: transformers {package_version('transformers')} has no model type {str(kind)[:60]!r}; "
            "give another model"
        )
    if pool not in (None, *POOLS):
        raise UserError(f"pool {pool!r} is unknown; choose from {', '.join(POOLS)}")
    arguments = _without_code(settings) | ({"projection_dim": projection} if projection else {})
    arguments.pop("model_type", None)
    return {
        "architecture": "transformers",
        "model": kind,
        "arguments": arguments,
        "resolution": resolution,
        "pool": pool or "own",
    }


def build(recipe: dict[str, Any], path: str | None = None) -> Body:
    """Build a vision model of transformers.

    Args:
      recipe: `model`, its type; `arguments` of its configuration; `resolution` and `pool`.
      path: of the weights; None: random weights.

    Raises:
      UserError: transformers cannot build it, or the weights do not fit.
    """
    import torch

    transformers = require("transformers")
    kind, pool = recipe["model"], recipe["pool"]
    name = f"transformers' {kind}"
    try:
        config = transformers.AutoConfig.for_model(kind, **_without_code(recipe["arguments"]))
        model_class = _class_of(transformers, config, pool)
        with torch.device("meta"):
            skeleton = model_class(config)
        if skeleton.main_input_name != "pixel_values":
            raise UserError(f"{name} takes no images; give a vision model")
        missing: set[str] = set()
        if path is None:
            model = model_class(config)
        else:
            model, report = model_class.from_pretrained(
                local_path(parent(path)), config=config, use_safetensors=True, local_files_only=True,
                trust_remote_code=False, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
            missing = set(report["missing_keys"])
            if report["mismatched_keys"]:
                raise UserError(
                    f"the weights do not fit {name}: {sorted(report['mismatched_keys'])[0]} has another shape; "
                    "give the config.json that they are of"
                )
    except UserError:
        raise
    except Exception as error:  # of configurations, constructors and files
        raise UserError(
            f"transformers {package_version('transformers')} cannot build {name} ({first_line(error)}); "
            "give another model"
        ) from None
    pool = _own_pool(kind, model, missing) if pool == "own" else pool
    needed = {
        key for key in missing if pool == "pooler" or not re.match(r"(.*\.)?(pooler|mask_token)\b", key)
    }
    if needed:
        raise UserError(
            f"the weights do not fit {name}: {min(needed)} is missing; give the config.json that they are of"
        )
    options: dict[str, Any] = {"return_dict": True}
    if recipe["resolution"]:
        options |= _resizing(model, name)
    return Body(model.eval().requires_grad_(False), options, lambda out: _pooled(out, pool, model))


def _without_code(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not _DROPPED.fullmatch(key)
    }


def _class_of(transformers: Any, config: Any, pool: str) -> Any:
    """Return the class with the projection where there is one and it is wanted, else the bare model."""
    bare = transformers.MODEL_MAPPING[type(config)]
    bare = bare[0] if isinstance(bare, tuple) else bare
    projected = getattr(transformers, f"{bare.__name__}WithProjection", None)
    if pool == "projection" and projected is None:
        raise UserError(f"{bare.__name__} has no projection; leave out --pool")
    return projected if projected is not None and pool in ("own", "projection") else bare


def _own_pool(kind: str, model: Any, missing: set[str]) -> str:
    """Return the pooling of a model: projection, class token, pooler or mean, whichever exists first."""
    names = {name for name, _ in model.named_parameters()}
    if any("visual_projection" in name for name in names):
        return "projection"
    if kind in _POOLERS_OF_TRAINING or any(name.endswith("cls_token") for name in names):
        return "tok"
    untrained = any(re.match(r"(.*\.)?pooler\b", key) for key in missing)
    return "gap" if untrained else "pooler"


def _pooled(out: Any, pool: str, model: Any) -> Any:
    """Pick the features [n, width] from an output of the model."""
    if pool == "projection":
        return out["image_embeds"]
    hidden = out["last_hidden_state"]
    if pool == "pooler" and out.get("pooler_output") is not None:
        pooled = out["pooler_output"]
        return pooled.reshape(len(pooled), -1)
    if hidden.ndim == 4:  # channels first
        return hidden.mean(axis=(2, 3))
    if pool == "tok":
        return hidden[:, 0]
    count = getattr(model.config, "num_register_tokens", 0) or 0
    has_token = any(name.endswith(("cls_token", "class_embedding")) for name, _ in model.named_parameters())
    return hidden[:, count + has_token :].mean(axis=1)


def _resizing(model: Any, name: str) -> dict[str, Any]:
    """Return the keyword arguments with which a model takes another resolution.

    Raises:
      UserError: it has none and positions of a fixed number.
    """
    from inspect import signature

    if "interpolate_pos_encoding" in signature(model.forward).parameters:
        return {"interpolate_pos_encoding": True}
    if any("position_embedding" in key for key, _ in model.named_parameters()):
        raise UserError(f"{name} has a fixed resolution; leave out --resolution")
    return {}
