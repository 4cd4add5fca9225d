"""An exported folder that is whole or absent: written beside its place and then renamed."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lit_fast.errors import UserError
from lit_fast.inference.model import Model


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


# Upload of an exported folder to the Hugging Face Hub, with its own package.


def check_push(name: str) -> None:
    """Raises UserError where nothing could be uploaded: no such name, no package, no token."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", name, re.ASCII):
        raise UserError(f"--push {name} is not of the form OWNER/NAME")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError(
            '--push needs huggingface_hub; install it with: pip install "lit-fast[hub]"'
        ) from None
    if not hub.get_token():
        raise UserError(
            "--push needs a token of the Hugging Face Hub; log in with: hf auth login, or set HF_TOKEN"
        )


def push(folder: Path, name: str, public: bool) -> None:
    """Upload a folder to the repository `name`, which is made if need be.

    Args:
      folder: whole, as `write_folder` leaves it.
      name: OWNER/NAME.
      public: without it the repository is private, and one that is not is refused.

    Raises:
      UserError: the Hub cannot be reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="lit_fast")
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        if not public and not api.repo_info(name).private:
            raise UserError(f"the repository {name} is public; say --public, or name another")
        address = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by lit_fast")
    except UserError as error:
        raise UserError(f"{folder} is written but was not uploaded: {error}") from None
    except Exception as error:  # of the package, of its HTTP client and of its uploader
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        again = f"hf upload {name} {folder}{'' if public else ' --private'}"
        raise UserError(
            f"{folder} is written but was not uploaded: {reason}; upload it with: {again}"
        ) from None
    print(f"uploaded to {address}")
