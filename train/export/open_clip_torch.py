"""Vision towers of timm and open_clip, which open_clip builds again by their names: config and tensors.

open_clip's projection is folded: (f - mean) W, where f is the tower's feature and W the image head. The shift becomes
a bias of the last linear layer or of the LayerNorm before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_fast.errors import UserError
from lit_fast.inference.model import Model
from lit_fast.towers.torch.packages import require
from lit_fast.towers.torch.timm import POOLS
from lit_fast.train.export.fold import image_head
from lit_fast.weights.to_torch import Tensors

_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}


def torch_vision(model: Model) -> tuple[dict[str, Any], Tensors]:
    """Return `vision_cfg` and the tensors of open_clip's vision tower.

    Raises:
      UserError: open_clip cannot build the tower.
    """
    recipe = model.tower_json
    if recipe["architecture"] == "timm":
        config, tensors = _timm(model)
    elif recipe["architecture"] == "open_clip":
        config, tensors = _open_clip(model)
    else:
        raise _refusal(model, f"{recipe['architecture']}'s {recipe['model']} is not in timm or open_clip")
    config |= {"image_size": model.tower.preprocess.size}
    _check(model, config, tensors)
    return config, tensors


def _timm(model: Model) -> tuple[dict[str, Any], Tensors]:
    """Return timm's trunk and a linear projection with bias."""
    recipe, module = model.tower_json, _module(model)
    if others := recipe["arguments"].keys() - {"img_size"}:
        raise _refusal(model, f"timm's {recipe['model']} has the argument {min(others)}")
    kernel, trunk = image_head(model), _state(module)
    if recipe["pool"] == "projection":
        kernel, trunk = _without_classifier(module, trunk, kernel)
    pool = POOLS.get(recipe["pool"], "")
    return _timm_config(recipe["model"], pool), _with_projection(model, trunk, kernel)


def _timm_config(name: str, pool: str) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "timm_proj_bias": True}


def _with_projection(
    model: Model, trunk: Tensors, kernel: np.ndarray, bias: np.ndarray | float = 0.0
) -> Tensors:
    """Return a trunk's tensors with a projection.

    Args:
      model: has the mean feature and the image head.
      trunk: tensors of the trunk.
      kernel: float32 [trunk's width, width].
      bias: float [width] of the same projection.
    """
    shift = bias - np.asarray(model.params["mean"], np.float64) @ image_head(model)
    projection = {"head.proj.weight": kernel.T, "head.proj.bias": np.asarray(shift, np.float32)}
    return {f"trunk.{name}": array for name, array in trunk.items()} | projection


def _without_classifier(trunk: Any, tensors: Tensors, head: np.ndarray) -> tuple[np.ndarray, Tensors]:
    """Return the product of a trunk's bias-free classifier and `head`, and the tensors without the classifier."""
    layer = trunk.get_classifier()
    prefix = next(name for name, module in trunk.named_modules() if module is layer)
    kernel = layer.weight.detach().numpy().T @ head
    return kernel, {name: array for name, array in tensors.items() if not name.startswith(f"{prefix}.")}


def _open_clip(model: Model) -> tuple[dict[str, Any], Tensors]:
    """Return open_clip's own tower with its last layer folded."""
    recipe, visual, head = model.tower_json, _module(model), image_head(model)
    config, tensors = dict(recipe["arguments"]["vision_cfg"]), _state(visual)
    if hasattr(visual, "trunk"):
        return _open_clip_timm(model, visual, config)
    if hasattr(visual, "attnpool"):  # ResNets
        weight, bias = tensors["attnpool.c_proj.weight"], tensors["attnpool.c_proj.bias"]
        folded = (bias - np.asarray(model.params["mean"])) @ head
        return config, tensors | {"attnpool.c_proj.weight": head.T @ weight, "attnpool.c_proj.bias": folded}
    if recipe["arguments"]["quick_gelu"]:
        raise _refusal(
            model, f"{recipe['model']} has QuickGELU, which open_clip would use in the text tower too"
        )
    mean: np.ndarray = np.asarray(model.params["mean"], np.float64)
    if visual.proj is None:
        projection, shift = head, mean
        config["pool_type"] = visual.pool_type
    else:
        own = visual.proj.detach().numpy()
        projection = own @ head
        shift = np.linalg.lstsq(own.T.astype(np.float64), mean, rcond=None)[0]
    bias = (tensors["ln_post.bias"] - shift).astype(np.float32)
    return config | {"output_tokens": False}, tensors | {"proj": projection, "ln_post.bias": bias}


def _open_clip_timm(model: Model, visual: Any, config: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    head, trunk = image_head(model), _state(visual.trunk)
    name, pool = config["timm_model_name"], config.get("timm_pool", "avg")
    kernel, bias = head, np.zeros(len(head), np.float32)
    if model.tower_json["pool"] != "projection":
        return _timm_config(name, POOLS[model.tower_json["pool"]]), _with_projection(model, trunk, kernel)
    last = visual.head.mlp.fc2 if hasattr(visual.head, "mlp") else getattr(visual.head, "proj", None)
    if last is None and not len(visual.head):  # the trunk's own classifier, or nothing
        last = visual.trunk.get_classifier()
        if hasattr(last, "weight"):
            _, trunk = _without_classifier(visual.trunk, trunk, head)
    if last is not None and hasattr(last, "weight"):
        kernel = last.weight.detach().numpy().T @ head
        bias = bias if last.bias is None else last.bias.detach().numpy() @ head
    elif visual.head is not None and len(visual.head):
        raise _refusal(model, f"{model.tower_json['model']} has an attention pooling after {name}")
    tensors = _with_projection(model, trunk, kernel, bias)
    if not hasattr(visual.head, "mlp"):
        return _timm_config(name, pool), tensors
    first = {f"head.mlp.fc1.{k}": v.detach().numpy() for k, v in visual.head.mlp.fc1.state_dict().items()}
    renamed = {f"head.mlp.fc2.{k}": tensors.pop(f"head.proj.{k}") for k in ("weight", "bias")}
    return _timm_config(name, pool) | {"timm_proj": "mlp"}, tensors | first | renamed


def _check(model: Model, config: dict[str, Any], tensors: Tensors) -> None:
    """Raise UserError unless open_clip builds a tower with exactly these tensors."""
    import torch

    open_clip = require("open_clip")
    try:
        with torch.device("meta"):
            built = open_clip.CLIP(model.width, config, _TEXT).visual.state_dict()
    except Exception as error:  # of open_clip's and timm's constructors
        raise _refusal(model, " ".join(str(error).split())[:120]) from None
    want = {name: tuple(value.shape) for name, value in built.items()}
    have = {name: array.shape for name, array in tensors.items()}
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise _refusal(model, f"its {name} has shape {want.get(name)} there and {have.get(name)} here")


def _module(model: Model) -> Any:
    return model.tower.body.module  # type: ignore[attr-defined]


def _state(module: Any) -> Tensors:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def _refusal(model: Model, reason: str) -> UserError:
    return UserError(
        f"open_clip cannot express the vision tower {model.tower.name}: {reason}; export with --format lit_fast"
    )
