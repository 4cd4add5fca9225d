"""The subcommand `train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_fast.cli import Run
from lit_fast.config import Config, load_config, to_toml
from lit_fast.overrides import add_overrides, overrides


def train(parser: argparse.ArgumentParser) -> Run:
    """Train the text tower; the same command again goes on where it stopped.

    Every key of the config can be overridden: --optimizer.learning_rate 3e-4 --stream.global_batch 4096.
    """
    parser.epilog = f"keys and their defaults:\n\n{to_toml(Config())}"
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--workdir", type=Path, required=True, metavar="W", help="the run's directory")
    parser.add_argument(
        "--profile-steps",
        default="",
        metavar="A:B",
        help="write a profile of the steps A to B into W/profile, for TensorBoard and Perfetto",
    )
    add_overrides(parser)

    def run(args: argparse.Namespace) -> None:
        from lit_fast.compiled import keep_compiled
        from lit_fast.processes import join
        from train.loop import train as train_run

        config = load_config(args.config, overrides(args))
        join()
        keep_compiled()
        train_run(config, args.workdir, args.profile_steps)

    return run
