"""List the models that timm and open_clip publish, with figures of their architectures; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lit_fast.errors import UserError
from lit_fast.towers import preprocess_config
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.torch.load import build, model_tower
from lit_fast.towers.torch.packages import require
from lit_fast.weights.registry import TowerRow, known_towers

_MOST_MEASURED = 100  # architectures; each takes 0.1 to 1 s
_PREFIXES = ("timm:", "open_clip:")


class _Published(NamedTuple):
    """A published model.

    Attributes:
      name: the value of `--tower`.
      licence, source: of the weights.
      config: content of the library's configuration.
    """

    name: str
    licence: str
    source: str
    config: dict[str, Any]


class Listing(NamedTuple):
    """Published models.

    Attributes:
      rows: of the table.
      unmeasured: rows whose figures were not computed, since there are too many.
      unusual: models that are left out, as their preprocessing cannot be expressed.
    """

    rows: list[TowerRow]
    unmeasured: int
    unusual: int


def published_towers(query: str) -> Listing:
    """Return the models of timm and open_clip with `query` in their names, but for the towers of the registry.

    Raises:
      UserError: packages of the extra `torch` are missing or do not fit each other.
    """
    require("torchax")
    measured: dict[str, tuple[str, ...]] = {}
    rows, unmeasured, unusual = [], 0, 0
    for model in (*_timm(query), *_open_clip(query)):
        try:
            recipe, preprocess = _describe(model)
        except UserError:
            unusual += 1
            continue
        key = f"{recipe} {preprocess.size}"
        if key not in measured and len(measured) < _MOST_MEASURED:
            measured[key] = _figures(recipe, preprocess.size)
        unmeasured += key not in measured
        width, parameters, flops = measured.get(key, ("-", "-", "-"))
        pool = "projection" if recipe["pool"] == "projection" else "-"
        size = str(preprocess.size)
        rows.append(TowerRow(model.name, width, size, pool, parameters, flops, model.licence, model.source))
    return Listing(rows, unmeasured, unusual)


def random_tower(name: str) -> Any:
    """Return the `TorchTower` of a published model with random weights, for its shapes and operations.

    Args:
      name: timm:NAME or open_clip:ARCHITECTURE[/PRETRAINED].

    Raises:
      UserError: there is no such model, or the extra `torch` is missing.
    """
    require("torchax")
    from lit_fast.towers.torch import open_clip, timm

    prefix = next(p for p in _PREFIXES if name.startswith(p))
    modules: dict[str, Callable[[str], dict[str, Any]]] = {
        "timm:": timm.config_of,
        "open_clip:": open_clip.config_of,
    }
    config = modules[prefix](name.removeprefix(prefix))
    recipe, preprocess = _describe(_Published(name, "", "", config))
    return model_tower(name, name, "", preprocess, build(recipe), recipe)


def is_published_name(name: str) -> bool:
    """Return whether a name has the form of those that `random_tower` takes."""
    return name.startswith(_PREFIXES)


def _timm(query: str) -> Iterator[_Published]:
    timm = require("timm")
    own = {tower.name for tower in known_towers()}
    for name in timm.list_pretrained():
        if query in f"timm:{name}".lower() and f"timm:{name}" not in own:
            settings = timm.get_pretrained_cfg(name)
            if settings.hf_hub_id:
                config = {"architecture": name.partition(".")[0], "pretrained_cfg": settings.to_dict()}
                licence = settings.license or "unknown"
                yield _Published(f"timm:{name}", licence, f"hf.co/{settings.hf_hub_id}", config)


def _open_clip(query: str) -> Iterator[_Published]:
    from lit_fast.towers.torch import open_clip

    package = require("open_clip")
    for architecture, tag in package.list_pretrained():
        name = f"{architecture}/{tag}"
        location = package.get_pretrained_cfg(architecture, tag).get("hf_hub", "").rpartition("/")[0]
        if query in f"open_clip:{name}".lower() and location:
            yield _Published(
                f"open_clip:{name}", "see source", f"hf.co/{location}", open_clip.config_of(name, quiet=True)
            )


def _describe(model: _Published) -> tuple[dict[str, Any], Preprocess]:
    """Return the recipe and the preprocessing of a published model."""
    from lit_fast.towers.torch import open_clip, timm

    if "model_cfg" in model.config:
        preprocess = preprocess_config.open_clip(model.config, model.name)
        return open_clip.recipe(model.config, model.name, None, None), preprocess
    settings = model.config["pretrained_cfg"]
    classifier = settings.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    # A classifier of classes has a bias, a projection has none.
    classes = 0 if "_ft_in" in str(settings.get("tag")) else settings.get("num_classes", 0)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (classes,) for name in names} if classes else {}
    recipe = timm.recipe(model.config, model.name, shapes, lambda name: True, None, None)
    return recipe, preprocess_config.timm(settings, model.name)


def _figures(recipe: dict[str, Any], size: int) -> tuple[str, str, str]:
    """Return width, parameters and GFLOPs as text, "-" where they are unknown; no memory is allocated."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"), torch.no_grad():
            module = build(recipe).module
            parameters = sum(value.numel() for value in module.parameters())
            with FlopCounterMode(display=False) as counter:
                out = module(torch.empty(1, 3, size, size))
        out = out[0] if isinstance(out, tuple) else out
        return str(out.shape[-1]), f"{parameters / 1e6:.1f} M", f"{counter.get_total_flops() / 1e9:.1f}"
    except Exception:  # a model that cannot run without data
        return "-", "-", "-"
