"""Options that several commands share, their output files, and the start of JAX."""

from __future__ import annotations

import argparse
import inspect
import os
import warnings

from lit_fast.config import sections, settings
from lit_fast.config_io import describe
from lit_fast.errors import UserError, os_reason
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import exists, is_directory, is_stream, local_path
from lit_fast.storage.machine import keep_freed_memory
from lit_fast.storage.paths import StrPath, absolute, is_bucket, join, name, parent
from lit_fast.storage.text_files import json_bytes


def check_output(location: StrPath | None, option: str = "--json") -> None:
    """Check before the work that its result can be written; None: the option was not given.

    Raises:
      UserError: it cannot be written.
    """
    if location is None:
        return
    if is_directory(location) or (is_bucket(location) and os.fspath(location).endswith("/")):
        raise UserError(f"{option} {location} is a directory; give the name of a file")
    if is_bucket(location):
        if not name(parent(location)):
            raise UserError(f"{option} {location} is a bucket; give the name of a file in it")
        return
    if is_stream(location):
        return
    directory = parent(absolute(location))
    while not exists(directory):
        directory = parent(directory)
    if not is_directory(directory) or not os.access(local_path(directory), os.W_OK):
        raise UserError(
            f"{option} {location} cannot be written: {directory} is not a writable directory; name "
            "another file"
        )


def write_json_output(location: StrPath | None, value: object) -> None:
    """Write the file of `--json`, if the option was given; raises UserError where it cannot be written."""
    if location is not None:
        write_output(location, json_bytes(value), "--json")


def write_output(location: StrPath, data: bytes, option: str) -> None:
    """Write the file of an option; raises UserError where it cannot be written."""
    try:
        write_atomic(location, data)
    except OSError as error:
        raise UserError(
            f"{option} {location} cannot be written: {os_reason(error)}; name another file"
        ) from None


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add every key of the configuration as a flag, in one help group per section; call it after the other options.

    Unknown options are passed to `load_config`, which names the nearest known key.
    """
    parser.usage = parser.format_usage().removeprefix("usage: ").rstrip() + " [--section.key VALUE ...]"
    groups = {
        section: parser.add_argument_group(
            f"[{section}]" if section else "configuration", inspect.getdoc(cls)
        )
        for section, cls in sections().items()
    }
    for key in settings():
        kind, default, choices, text = describe(key)
        choices = f"; one of {choices}" if choices else ""
        groups[key.rpartition(".")[0]].add_argument(
            f"--{key}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{text} ({kind}{choices}; default {default})".replace("%", "%%"),
        )
    parser.set_defaults(takes_overrides=True)


def overrides(args: argparse.Namespace) -> list[str]:
    """Return the overrides that were given, as `load_config` takes them."""
    given = vars(args)
    return [f"--{key}={given[key]}" for key in settings() if key in given] + list(args.unknown)


def reuse_memory() -> None:
    """Have programs on the CPU run in the calling thread and use the memory again that the one before has freed.

    XLA allocates the temporaries of a step in each step, and the system would clear every page of them again. Call it
    in the main thread before `start_jax`. It has no effect where there is a GPU or TPU, or without glibc.
    """
    import jax

    if keep_freed_memory():
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def start_jax() -> None:
    """Start JAX with its persistent compilation cache, in JAX_COMPILATION_CACHE_DIR or the cache of lit_fast.

    Every command that needs a device calls it before any other use of JAX, and after `process_rank`.

    Raises:
      UserError: JAX_PLATFORMS names a device that cannot be used here, or none can.
    """
    import jax

    from lit_fast.runtime import start_devices
    from lit_fast.storage.cache import cache_directory

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", join(cache_directory(), "compiled"))
    # A cache on a full disk, or in a home that cannot be written, costs time only.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    start_devices()
