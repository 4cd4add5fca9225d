"""Upload of an exported folder to the Hugging Face Hub, with its own package."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from lit_fast.errors import UserError


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
