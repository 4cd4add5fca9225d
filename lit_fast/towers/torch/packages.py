"""Import the packages of the extra `torch`; each way in which they do not fit each other is one line."""

from __future__ import annotations

import importlib
import logging
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lit_fast.errors import UserError, first_line

EXTRA = "pip install 'lit-fast[torch]'"
TORCHAX = "0.0.14.dev20261026"  # the version that the tests ran with, as in pyproject.toml

_DISTRIBUTIONS = {"open_clip": "open_clip_torch"}


def require(name: str) -> Any:
    """Import a package of the extra `torch`.

    Args:
      name: torch, torchax, timm, open_clip or transformers.

    Raises:
      UserError: it is not installed, or does not fit the others.
    """
    if name in ("open_clip", "transformers"):  # both import timm or torchvision on their own
        require("timm")
    if name != "torch":
        require("torch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        raise UserError(f"package {missing} is not installed; install it with: {EXTRA}") from None
    except Exception as error:  # of compiled operators, of attributes that another version has
        raise UserError(_mismatch(name, error)) from None
    if name in ("timm", "open_clip"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if name == "transformers":
        package.logging.set_verbosity_error()
        package.logging.disable_progress_bar()
    return package


def installed(name: str) -> bool:
    """Return whether a package is installed; nothing is imported."""
    return package_version(name) != ""


def package_version(name: str) -> str:
    """Return the version of a package, "" if it is not installed."""
    try:
        return version(_DISTRIBUTIONS.get(name, name))
    except PackageNotFoundError:
        return ""


def _mismatch(name: str, error: Exception) -> str:
    torch, vision = package_version("torch"), package_version("torchvision")
    if "torchvision" in str(error):
        return f"torch {torch} and torchvision {vision} do not fit each other; install both from one index"
    if name == "torchax":
        return (
            f"torchax {package_version(name)} does not work with torch {torch} ({first_line(error, 80)}); "
            f"pip install 'torchax=={TORCHAX}'"
        )
    return f"package {name} cannot be imported: {first_line(error)}; {EXTRA}"
