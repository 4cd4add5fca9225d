"""An exported folder that is whole or absent: written beside its place and then renamed."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lit_fast.errors import UserError
from lit_fast.model import Model


def check_folder(out: Path) -> None:
    """Raises UserError unless `out` is a directory that can be made, or an empty one."""
    if out.is_dir():
        if any(out.iterdir()):
            raise UserError(f"--out {out} is not empty; name a new directory")
    elif out.exists() or out.is_symlink():
        raise UserError(f"--out {out} is not a directory")


def write_folder(module: str, model: Model, out: Path, options: dict[str, Any]) -> None:
    """Write a model into the directory `out`, which appears when all is written.

    Args:
      module: name of the format's module, with `check` and `write`.
      options: of both functions.

    Raises:
      UserError: the format cannot express the model, or the directory cannot be written.
    """
    writer = importlib.import_module(module)
    writer.check(model, **options)
    place, mask = out.resolve(), _umask()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    try:
        writer.write(model, temporary, **options)
        for path in (temporary, *temporary.rglob("*")):  # mkdtemp and safetensors write for the owner alone
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            _to_disk(path)
        os.rename(temporary, place)
        _to_disk(place.parent)
    except (OSError, SafetensorError) as error:  # the second is the package's only name for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out} cannot be written: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    names = ", ".join(sorted(file.name for file in place.iterdir()))
    print(f"exported step {model.step} to {out}: {size / 1e6:,.1f} MB in {names}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
