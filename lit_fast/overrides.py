"""Keys of the config as options of a command: `--section.key value`, anywhere on the command line."""

from __future__ import annotations

import argparse

from lit_fast.config import Config, flatten


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
