"""Upload an exported directory to the Hugging Face Hub."""

from __future__ import annotations

import re

from lit_fast.errors import UserError
from lit_fast.utils.output import result


def check_push(repository: str) -> None:
    """Raise UserError if `repository` is not OWNER/NAME or there is no token."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", repository, re.ASCII):
        raise UserError(f"--push {repository} is not of the form OWNER/NAME; name the repository in full")
    if not get_token():
        raise UserError(
            "--push needs a token of the Hugging Face Hub; log in with: hf auth login, or set HF_TOKEN"
        )


def push(directory: str, repository: str, public: bool) -> None:
    """Upload a directory to a repository, which is created if it does not exist.

    Args:
      directory: an exported directory.
      repository: OWNER/NAME.
      public: create a public repository; without it the repository must be private.

    Raises:
      UserError: the Hub cannot be reached or refuses; the directory stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="lit_fast")
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise UserError(f"the repository {repository} is public; add --public, or name another")
        url = api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Exported by lit_fast"
        )
    except UserError as error:
        raise UserError(f"{directory} is written but was not uploaded: {error}") from None
    except Exception as error:  # of huggingface_hub, its HTTP client and its uploader
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        command = f"hf upload {repository} {directory}{'' if public else ' --private'}"
        raise UserError(
            f"{directory} is written but was not uploaded: {reason}; upload it with: {command}"
        ) from None
    result(f"uploaded to {url}")
