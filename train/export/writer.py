"""Write a model in one of the export formats, and upload the directory.

To add a format, write a module with the two functions of `ExportFormat` and add it to `FORMATS`.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from safetensors import SafetensorError

from lit_fast.errors import UserError, first_line, os_reason
from lit_fast.storage.atomic import replacing_directory
from lit_fast.storage.files import directory_size, exists, is_directory, list_names
from lit_fast.storage.lock import Lock
from lit_fast.storage.paths import absolute, is_bucket, join, name, parent
from lit_fast.utils.output import result

if TYPE_CHECKING:  # `lit-fast export --help` reads the table without importing JAX
    from lit_fast.inference.model import Model


@dataclass(frozen=True)
class ExportOptions:
    """Options that only some formats accept, see `FORMATS`."""

    vision: bool = False  # export the vision tower too
    classes: str | None = None  # file of class names, one a line
    templates: str | None = None  # file of prompt templates, one a line, with "{c}" for the class name
    nearest_pixels: bool = False  # accept a preprocessing that differs from the tower's


class ExportFormat(Protocol):
    """The functions that the module of a format defines."""

    def check(self, model: Model, options: ExportOptions) -> None:
        """Raise UserError if the format cannot express the model.

        It is called before anything is written.
        """

    def write(self, model: Model, directory: str, options: ExportOptions) -> None:
        """Write the model's files and its card into an empty local directory."""


# The files that other programs open first are uploaded last.
_LAST = ("config.json", "open_clip_config.json")

# Format -> its module in this package, and the fields of `ExportOptions` that it accepts.
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lit_fast": ("native", ()),
    "big_vision": ("big_vision", ()),
    "open_clip": ("open_clip", ("nearest_pixels",)),
    "transformers": ("transformers", ()),
    "onnx": ("onnx", ("vision", "classes", "templates")),
}


def format_module(format_name: str) -> ExportFormat:
    """Import the module of a format."""
    return cast(ExportFormat, importlib.import_module(f"{__package__}.{FORMATS[format_name][0]}"))


def check_options(format_name: str, options: ExportOptions) -> None:
    """Raise UserError if an option is set that the format does not accept."""
    for option in {option for _, accepted in FORMATS.values() for option in accepted}:
        if getattr(options, option) and option not in FORMATS[format_name][1]:
            owners = " or ".join(name for name, (_, accepted) in FORMATS.items() if option in accepted)
            flag = option.replace("_", "-")
            raise UserError(f"--{flag} is for --format {owners}; leave it out or change --format")


def check_directory(out: str) -> None:
    """Raise UserError unless `out` is absent or an empty directory."""
    if is_directory(out):
        if list_names(out):
            raise UserError(f"--out {out} is not empty; name a new directory")
    elif exists(out) or (
        not is_bucket(out) and name(out) in list_names(parent(out))
    ):  # the second: a link to nothing
        raise UserError(f"--out {out} is not a directory; name a new one")


def lock_directory(out: str) -> Lock:
    """Lock the absent or empty directory `out` against other exports; the lock is beside it.

    Raises:
      UserError: another process exports there.
    """
    path = absolute(out)
    return Lock(join(parent(path), f".{name(path)}.lock"), f"--out {out}", "name another directory")


def write_directory(format_name: str, model: Model, out: str, options: ExportOptions) -> None:
    """Write a model into the directory `out`.

    The directory appears when all files are complete.

    Raises:
      UserError: the format cannot express the model, or the directory cannot be written.
    """
    exporter = format_module(format_name)
    exporter.check(model, options)
    try:
        with replacing_directory(out, _LAST) as temporary:
            exporter.write(model, temporary, options)
            size, names = directory_size(temporary), ", ".join(list_names(temporary))
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by its own exception
        reason = os_reason(error) if isinstance(error, OSError) else first_line(error)
        raise UserError(f"--out {out} cannot be written: {reason}; name another directory") from None
    result(f"exported step {model.step} to {out}: {size / 1e6:,.1f} MB in {names}")


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
