"""torch, timm and transformers, which some tests compare with; these tests skip where they are absent."""

import importlib
import os
import sys
from typing import Any

import pytest

_libraries: list[Any] = []  # operators live as long as their library object


def import_package(name: str) -> Any:
    """`timm` or `transformers`, also with a torchvision whose compiled operators do not fit torch.

    None of its operators is needed; the missing ones are declared.
    """
    torch = pytest.importorskip("torch")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        _declare_operators(torch)
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed")


def _declare_operators(torch: Any) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for _ in range(20):
        for module in [m for m in sys.modules if m.startswith("torchvision")]:
            del sys.modules[module]
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            operator = str(error).partition("torchvision::")[2].split()[0]
            library.define(f"{operator}(Tensor x) -> Tensor")
    pytest.skip("torchvision does not load")
