"""The export formats, their interface, and the directory that they fill.

To add a format, write a module with the two functions of `ExportFormat` and add it to `FORMATS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from safetensors import SafetensorError

from lit_fast.errors import UserError
from lit_fast.storage.files import (
    directory_size,
    exists,
    is_directory,
    list_names,
    replacing_directory,
)
from lit_fast.storage.paths import name, parent
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


class FormatEntry(NamedTuple):
    """The module of a format and the fields of `ExportOptions` that it accepts."""

    module: str
    options: tuple[str, ...] = ()


FORMATS = {
    "lit_fast": FormatEntry("lit_fast.train.export.native"),
    "big_vision": FormatEntry("lit_fast.train.export.big_vision"),
    "open_clip": FormatEntry("lit_fast.train.export.open_clip", ("nearest_pixels",)),
    "transformers": FormatEntry("lit_fast.train.export.transformers"),
    "onnx": FormatEntry("lit_fast.train.export.onnx", ("vision", "classes", "templates")),
}


def check_options(format_name: str, options: ExportOptions) -> None:
    """Raise UserError if an option is set that the format does not accept."""
    for owner, entry in FORMATS.items():
        for option in entry.options:
            if getattr(options, option) and owner != format_name:
                raise UserError(
                    f"--{option.replace('_', '-')} is for --format {owner}; leave it out or change --format"
                )


def check_directory(out: str) -> None:
    """Raise UserError unless `out` is absent or an empty directory."""
    if is_directory(out):
        if list_names(out):
            raise UserError(f"--out {out} is not empty; name a new directory")
    elif exists(out) or name(out) in list_names(parent(out)):  # the second: a link to nothing
        raise UserError(f"--out {out} is not a directory; name a new one")


def write_directory(format_name: str, model: Model, out: str, options: ExportOptions) -> None:
    """Write a model into the directory `out`.

    The directory appears when all files are complete.

    Raises:
      UserError: the format cannot express the model, or the directory cannot be written.
    """
    exporter = cast(ExportFormat, importlib.import_module(FORMATS[format_name].module))
    exporter.check(model, options)
    try:
        with replacing_directory(out) as temporary:
            exporter.write(model, temporary, options)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by its own exception
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out} cannot be written: {reason}; name another directory") from None
    size, names = directory_size(out), ", ".join(list_names(out))
    result(f"exported step {model.step} to {out}: {size / 1e6:,.1f} MB in {names}")
