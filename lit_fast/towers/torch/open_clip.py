"""Build the vision towers of open_clip from its model configurations and tensors."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from lit_fast.errors import UserError
from lit_fast.towers.torch.packages import package_version, require
from lit_fast.towers.torch.state import Tensors, check_size
from lit_fast.towers.torch.tower import Body
from lit_fast.utils.output import status

PREFIX = "visual."  # of the vision tower's tensors in a whole model

# The text tower is not built: the smallest one that open_clip accepts.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
_VIT_POOLS = {"tok": "tok", "gap": "avg"}
_TIMM_POOLS = {"tok": "token", "gap": "avg", "map": "map"}
_PREPROCESS = ("size", "mode", "mean", "std", "interpolation", "resize_mode")


def config_of(name: str, *, quiet: bool = False) -> dict[str, Any]:
    """Return the content of `open_clip_config.json` for ARCHITECTURE or ARCHITECTURE/PRETRAINED.

    Prints a note on an activation that differs from the architecture's, unless `quiet`.

    Raises:
      UserError: open_clip has no such model or weights, or the extra is missing.
    """
    open_clip = require("open_clip")
    architecture, _, tag = name.partition("/")
    model = open_clip.get_model_config(architecture) if ":" not in architecture else None
    if model is None:
        near = get_close_matches(architecture, open_clip.list_models(), n=2, cutoff=0.6)
        hint = f"nearest: {', '.join(near)}" if near else "`lit-fast towers QUERY` lists names"
        raise UserError(f"open_clip {package_version('open_clip')} has no model {architecture}; {hint}")
    settings = _weights(open_clip, architecture, tag) if tag else {}
    if settings.get("quick_gelu") and not model.get("quick_gelu"):
        if not quiet:
            status(f"note: {name} was trained with QuickGELU, which is used")
        model["quick_gelu"] = True
    preprocess = {key: settings[key] for key in _PREPROCESS if settings.get(key) is not None}
    return {"model_name": architecture, "model_cfg": model, "preprocess_cfg": preprocess}


def repository_of(name: str) -> tuple[str, str]:
    """Return the repository OWNER/NAME and file of ARCHITECTURE/PRETRAINED, or of the only weights of ARCHITECTURE.

    Raises:
      UserError: open_clip has no such model or weights, or they are no file of the Hub.
    """
    open_clip = require("open_clip")
    architecture, _, tag = name.partition("/")
    config_of(architecture)  # names the nearest model if there is none
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tag:
        if len(tags) != 1:
            choices = f"choose from {', '.join(tags)}" if tags else "give a file with --arch"
            raise UserError(f"open_clip:{architecture} has {len(tags)} pretrained weights; {choices}")
        tag = tags[0]
    location = str(_weights(open_clip, architecture, tag).get("hf_hub") or "")
    repository, _, file = location.rpartition("/")
    if not repository:
        raise UserError(
            f"open_clip:{architecture}/{tag} is not on the Hugging Face Hub; give its .safetensors with "
            f"--arch open_clip:{architecture}/{tag}"
        )
    return repository, f"{file.rpartition('.')[0]}.safetensors" if file else "open_clip_model.safetensors"


def recipe(config: dict[str, Any], where: str, pool: str | None, resolution: int | None) -> dict[str, Any]:
    """Return the recipe of a vision tower, see `build`.

    Args:
      config: content of `open_clip_config.json`.
      where: its path, for messages.
      pool: "projection" or None for the embedding, "tok", "gap" or "map" for the vector before the projection.
      resolution: pixels, None for the model's own.

    Raises:
      UserError: the configuration is damaged.
    """
    model = config.get("model_cfg", config)
    vision, width = model.get("vision_cfg"), model.get("embed_dim")
    if not isinstance(vision, dict) or type(width) is not int:
        raise UserError(f"{where} is not that of an open_clip model; give one with embed_dim and vision_cfg")
    if pool not in (None, "projection", *_TIMM_POOLS):
        raise UserError(f"pool {pool!r} is unknown; choose from projection, tok, gap, map")
    vision = {key: value for key, value in vision.items() if key != "timm_model_pretrained"}
    return {
        "architecture": "open_clip",
        "model": str(config.get("model_name", "")),
        "arguments": {
            "embed_dim": width,
            "vision_cfg": vision,
            "quick_gelu": bool(model.get("quick_gelu", False)),
        },
        "resolution": resolution if resolution != image_size(config, where) else None,
        "pool": pool or "projection",
    }


def image_size(config: dict[str, Any], where: str) -> int:
    """Return the height and width of the images of a model in pixels.

    Raises:
      UserError: they differ.
    """
    value = config.get("model_cfg", config)["vision_cfg"].get("image_size", 224)
    sides = value if isinstance(value, list | tuple) else [value]
    if len(sides) not in (1, 2) or sides[0] != sides[-1] or type(sides[0]) is not int or sides[0] < 1:
        raise UserError(f"{where}: image_size {value!r} is not the side of a square; give another model")
    return int(sides[0])


def build(recipe: dict[str, Any], tensors: Tensors | None = None) -> Body:
    """Build a vision tower of open_clip.

    Args:
      recipe: `arguments` of open_clip.CLIP, `resolution` and `pool`.
      tensors: with or without the prefix "visual."; None: random weights.

    Raises:
      UserError: open_clip cannot build it, or the tensors do not fit.
    """
    import torch

    open_clip, name = require("open_clip"), f"open_clip's {recipe['model'] or 'model'}"
    arguments, size = recipe["arguments"], recipe["resolution"]
    vision = dict(arguments["vision_cfg"]) | {"timm_model_pretrained": False}
    trunk = vision.get("timm_model_name")
    if trunk and not (isinstance(trunk, str) and require("timm").is_model(trunk) and ":" not in trunk):
        raise UserError(
            f"{name} has the trunk {str(trunk)[:60]!r}, which timm does not have; give another model"
        )
    if size and not trunk:
        vision["image_size"] = size

    def create() -> Any:
        return open_clip.CLIP(arguments["embed_dim"], vision, _NO_TEXT, arguments["quick_gelu"])

    try:
        if tensors is not None:
            with torch.device("meta"):
                skeleton = create()
            check_size(skeleton.visual, tensors, name)
        model = create()
        visual = model.visual
        if tensors is not None:
            named = tensors
            if not any(key.startswith(PREFIX) for key in named):
                named = {f"{PREFIX}{key}": tensor for key, tensor in named.items()}
            named = {key: tensor for key, tensor in named.items() if key.startswith(PREFIX)}
            open_clip.model.resize_pos_embed(named, model)
            visual.load_state_dict({key.removeprefix(PREFIX): tensor for key, tensor in named.items()})
        if size and trunk and hasattr(visual.trunk, "set_input_size"):
            visual.trunk.set_input_size(size)
    except UserError:
        raise
    except Exception as error:  # of the constructors and of load_state_dict
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "state_dict" in reason:
            reason = reason.partition(": ")[2]
            raise UserError(
                f"the weights do not fit {name}: {reason}; give the architecture that they are of"
            ) from None
        raise UserError(
            f"open_clip {package_version('open_clip')} cannot build {name} ({reason}); give another model"
        ) from None
    if recipe["pool"] != "projection":
        _remove_projection(visual, recipe["pool"], name)
    return Body(
        visual.eval().requires_grad_(False), {}, lambda out: out[0] if isinstance(out, tuple) else out
    )


def _remove_projection(visual: Any, pool: str, name: str) -> None:
    """Make a tower return the pooled vector before its projection.

    Raises:
      UserError: it has no such vector.
    """
    import torch

    if hasattr(visual, "trunk"):
        try:
            visual.trunk.reset_classifier(0, global_pool=_TIMM_POOLS[pool])
        except Exception:  # of timm, for a pooling that the trunk has no weights for
            raise UserError(f"pool {pool!r} does not fit {name}; leave out --pool") from None
        visual.head = torch.nn.Identity()
    elif getattr(visual, "pool_type", "") in _VIT_POOLS.values() and pool in _VIT_POOLS:
        visual.pool_type, visual.proj = _VIT_POOLS[pool], None
    else:
        raise UserError(f"pool {pool!r} does not fit {name}; leave out --pool")


def _weights(open_clip: Any, architecture: str, tag: str) -> dict[str, Any]:
    found = open_clip.get_pretrained_cfg(architecture, tag)
    if not found:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise UserError(
            f"open_clip:{architecture} has no weights {tag!r}; "
            + (f"choose from {', '.join(tags)}" if tags else "give a file with --arch")
        )
    return dict(found)
