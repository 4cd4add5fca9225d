"""torch, timm and transformers, which some tests compare with; these tests skip where they are absent."""

import importlib
import os
import re
import sys
from typing import Any

import pytest

_libraries: list[Any] = []  # operators live as long as their library object


def import_package(name: str) -> Any:
    """`timm` or `transformers`, also with a torchvision whose compiled operators do not fit torch.

    None of its operators is needed.
    """
    torch = pytest.importorskip("torch")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    load_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed")


def load_torchvision() -> None:
    """Import torchvision, if it is installed; declare the compiled operators that do not fit torch.

    Raises:
      RuntimeError: it does not load with 20 declared operators either.
    """
    for _ in range(20):
        try:
            importlib.import_module("torchvision")
            return
        except ImportError:
            return
        except RuntimeError as error:
            operator = re.search(r"torchvision::(\w+)", str(error))
            if operator is None:
                raise
        _declare(operator[1])
        for module in [m for m in sys.modules if m.startswith("torchvision")]:
            del sys.modules[module]
    raise RuntimeError("torchvision does not load")


def _declare(operator: str) -> None:
    import torch

    if not _libraries:
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
    _libraries[0].define(f"{operator}(Tensor x) -> Tensor")
