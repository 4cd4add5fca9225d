"""The files that options such as `--json OUT` ask for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lit_fast.config import Config, flatten
from lit_fast.errors import UserError
from lit_fast.storage.files import json_bytes, write_atomic


def check_output(path: Path | None, option: str = "--json") -> None:
    """Find out before the work whether its result can be written; None: it was not asked for.

    Raises:
      UserError: it cannot.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path} is a directory; give the name of a file")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written: {parent} is not a writable directory")


def write_json_output(path: Path | None, value: object) -> None:
    """The file of `--json`, if it was asked for; raises UserError where it cannot be written."""
    if path is not None:
        write_output(path, json_bytes(value), "--json")


def write_output(path: Path, data: bytes, option: str) -> None:
    """The file of an option; raises UserError where it cannot be written."""
    try:
        write_atomic(path, data)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}") from None


# Keys of the config as options of a command: `--section.key value`, anywhere on the command line.


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Let the command take every key of the config; its help is the caller's business.

    Unknown options are left for `load_config`, which names the nearest known key.
    """
    for key in flatten(Config()):
        parser.add_argument(f"--{key}", metavar="VALUE", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(takes_overrides=True)


def overrides(args: argparse.Namespace) -> list[str]:
    """What was given, as `load_config` takes it."""
    given = vars(args)
    return [f"--{key}={given[key]}" for key in flatten(Config()) if key in given] + list(args.unknown)
