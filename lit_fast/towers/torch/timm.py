"""Build models of timm from their configuration and tensors."""

from __future__ import annotations

import re
from typing import Any

from lit_fast.errors import UserError
from lit_fast.models.architecture import Architecture
from lit_fast.towers.torch.packages import installed, package_version, require
from lit_fast.towers.torch.state import Tensors, check_size
from lit_fast.towers.torch.tower import Body

POOLS = {"tok": "token", "gap": "avg", "map": "map"}

# Arguments that name files or other weights, or change what the model returns.
_REFUSED = re.compile(
    r"pretrained.*|checkpoint_path|cache_dir|features_only|out_indices|pruned|scriptable|exportable|no_jit"
)
# What timm needs of `pretrained_cfg` to build a model and to fit tensors into it.
_SETTINGS = ("input_size", "fixed_input_size", "pool_size", "first_conv", "classifier")
# Models whose classifier is the projection to the embeddings of images and texts.
_PROJECTED = re.compile(r"clip|pe_core")


def config_of(name: str) -> dict[str, Any]:
    """Return the content of `config.json` for a name of timm's registry, ARCHITECTURE or ARCHITECTURE.TAG.

    Raises:
      UserError: timm has no such model, or the extra is missing.
    """
    timm = require("timm")
    architecture, _, tag = name.partition(".")
    _check_name(timm, architecture)
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = ", ".join(timm.models.get_arch_pretrained_cfgs(architecture))
        raise UserError(f"timm's {architecture} has no weights {tag!r}; choose from {tags}") from None
    settings = found.to_dict() if found else {}
    return {"architecture": architecture, "pretrained_cfg": settings}


def padded_alike(name: str) -> str:
    """Return the architecture of equal parameters and other padding, "" where timm has none.

    Models converted from TensorFlow, `tf_NAME`, pad on one side; their weights fit NAME and give other features.
    """
    timm, name = require("timm"), name.partition(".")[0]
    other = name.removeprefix("tf_") if name.startswith("tf_") else f"tf_{name}"
    return other if timm.is_model(other) else ""


def repository_of(name: str) -> str:
    """Return the repository OWNER/NAME that timm downloads a model from, "" if it names none."""
    timm = require("timm")
    if not timm.is_model(name.partition(".")[0]):
        return ""
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError:
        return ""
    return str(found.hf_hub_id or "") if found else ""


def recipe(
    config: dict[str, Any],
    where: str,
    shapes: dict[str, tuple[int, ...]],
    is_zero: Any,
    pool: str | None,
    resolution: int | None,
) -> dict[str, Any]:
    """Return the recipe of a model, see `build`.

    Args:
      config: content of `config.json`.
      where: its path, for messages.
      shapes: of the tensors.
      is_zero: tells of the name of a tensor whether all its values are zero.
      pool: "tok", "gap", "map", "projection" or None for the model's own.
      resolution: pixels, None for the model's own.

    Raises:
      UserError: the configuration is damaged, or the model has no such pooling.
    """
    timm = require("timm")
    architecture, settings = str(config["architecture"]), config["pretrained_cfg"]
    tag = architecture.partition(".")[2] or str(settings.get("tag") or "")
    architecture = architecture.partition(".")[0]
    _check_name(timm, architecture)
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: model_args is not an object; give a config.json of timm")
    if refused := [key for key in arguments if _REFUSED.fullmatch(key)]:
        raise UserError(f"{where}: the model argument {refused[0]} is not allowed; remove it")
    arguments = {
        key: value for key, value in arguments.items() if key != "num_classes"
    }  # the tensors show it
    kept = {key: _as_list(settings[key]) for key in _SETTINGS if settings.get(key) is not None}
    if resolution and (kept.get("fixed_input_size") or "img_size" in arguments):
        arguments = arguments | {"img_size": resolution}
    classifiers = settings.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(map(str, classifiers))
    heads = [name for name in classifiers if f"{name}.weight" in shapes]
    classes = shapes[f"{heads[0]}.weight"][0] if heads else 0
    has_bias = any(f"{name}.bias" in shapes and not is_zero(f"{name}.bias") for name in heads)
    if pool is None and classes and not has_bias and _PROJECTED.search(f"{architecture}.{tag}"):
        pool = "projection"
    if pool == "projection" and (not classes or has_bias):
        raise UserError(
            f"pool 'projection' does not fit {architecture}, which has none; choose from tok, gap, map"
        )
    if pool not in (None, "projection", *POOLS):
        raise UserError(f"pool {pool!r} is unknown; choose from tok, gap, map, projection")
    return {
        "architecture": "timm",
        "model": architecture,
        "arguments": arguments,
        "settings": kept,
        "classes": classes,
        "pool": pool or "own",
    }


def vit_recipe(architecture: Architecture, size: int, pool: str | None) -> dict[str, Any]:
    """Return the recipe of timm's VisionTransformer for a ViT of big_vision's layout.

    Args:
      architecture: that of the weights.
      size: of the images in pixels.
      pool: "tok", "gap", "map" or None for the model's own.
    """
    a = architecture
    if pool == "projection":
        raise UserError("pool 'projection' does not fit a ViT of an .npz; choose from tok, gap, map")
    arguments = {
        "img_size": size,
        "patch_size": a.patch,
        "embed_dim": a.shape.width,
        "depth": a.shape.depth,
        "num_heads": a.shape.heads,
        "mlp_ratio": a.shape.mlp_dim / a.shape.width,
        "act_layer": "gelu_tanh" if a.gelu == "tanh" else "gelu",
        "class_token": a.class_token,
        "global_pool": POOLS[a.pool],
        "fc_norm": False,  # the norm is before the pooling, whatever the pooling is
    }
    recipe = {"architecture": "timm", "model": "vit_base_patch16_224", "arguments": arguments}
    return recipe | {"settings": {}, "classes": 0, "pool": pool or "own"}


def build(recipe: dict[str, Any], tensors: Tensors | None = None, npz: str | None = None) -> Body:
    """Build a model of timm.

    Args:
      recipe: `model`, its `arguments`, `settings` of its pretrained configuration, the `classes` of its classifier
        and `pool`: "own", "projection" (the classifier without bias) or a key of `POOLS`.
      tensors: under the published names; they are renamed and resampled by timm. None: random weights.
      npz: in place of tensors, a local file in big_vision's layout, which timm's ViT reads itself.

    Raises:
      UserError: timm cannot build it, or the tensors do not fit.
    """
    import torch

    timm = require("timm")
    name, classes, pool = recipe["model"], recipe["classes"], recipe["pool"]
    _check_name(timm, name)
    if any(_REFUSED.fullmatch(key) for key in recipe["arguments"]):
        raise UserError(f"timm's {name} has arguments that are not allowed; export the model again")
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in recipe["arguments"].items()}
    settings = recipe["settings"] | {"num_classes": classes, "label_offset": 0}
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}

    def create(state: Tensors | None) -> Any:
        return timm.create_model(
            name,
            pretrained=state is not None,
            pretrained_cfg=settings | ({} if state is None else {"state_dict": state}),
            num_classes=classes,
            **arguments,
        )

    try:
        if tensors is not None:
            with torch.device("meta"):
                skeleton = create(None)
            check_size(skeleton, tensors, name)
        module = create(tensors)
        if npz:
            module.load_pretrained(npz)
        if pool != "projection":
            module.reset_classifier(0, **({} if pool == "own" else {"global_pool": POOLS[pool]}))
    except UserError:
        raise
    except Exception as error:  # of timm's constructors and of load_state_dict
        raise UserError(_problem(name, recipe, error)) from None
    return Body(module.eval().requires_grad_(False), {}, lambda out: out)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _problem(name: str, recipe: dict[str, Any], error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if "state_dict" in reason or "size mismatch" in reason:
        reason = reason.partition(": ")[2]
        return f"the weights do not fit timm's {name}: {reason}; give the architecture that they are of"
    if "img_size" in reason:
        return f"timm's {name} has a fixed resolution ({reason}); leave out --resolution"
    if recipe["pool"] != "own":
        return f"pool {recipe['pool']!r} does not fit timm's {name} ({reason}); leave out --pool"
    return f"timm {package_version('timm')} cannot build {name} ({reason}); give another model"


def _check_name(timm: Any, name: str) -> None:
    if not timm.is_model(name) or ":" in name:
        from difflib import get_close_matches

        if installed("open_clip") and name in require("open_clip").list_models():
            near = [f"open_clip:{name}"]
        else:
            near = get_close_matches(name, timm.list_models(), n=2, cutoff=0.6)
        hint = f"nearest: {', '.join(near)}" if near else "`lit-fast towers QUERY` lists names"
        raise UserError(f"timm {package_version('timm')} has no model {name}; {hint}")
