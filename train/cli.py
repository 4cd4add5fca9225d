"""The subcommands `train` and `plan`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from lit_fast.cli.main import Run
from lit_fast.cli.options import add_overrides, check_output, overrides, write_json_output
from lit_fast.config import Config
from lit_fast.config_io import load_config, to_toml
from lit_fast.errors import UserError


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
        from lit_fast.cli.main import keep_compiled
        from lit_fast.runtime import initialize_distributed
        from lit_fast.train.loop import train as train_run

        config = load_config(args.config, overrides(args))
        initialize_distributed()
        keep_compiled()
        train_run(config, args.workdir, args.profile_steps)

    return run


def plan(parser: argparse.ArgumentParser) -> Run:
    """Tell whether a run fits the chips, how long it takes, what it costs and what limits it.

    The training step is compiled for a TPU slice that need not be here (pip install 'lit-fast[tpu]'), for this
    machine's processor, or for its GPUs; for GPUs that are not here the figures are estimates. Nothing is trained and
    no data are needed: what is assumed of them are the keys of the config's [plan]; --dataset D takes them from there.
    Every key of the config can be overridden: --text.keep hidden --plan.tower timm:vit_base_patch16_224.
    """
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIPS",
        help="v4:2x2x1 (a v4-8), v5e:2x2, v5p:2x2x1, v6e:2x2, gpu:h200, gpu:h100:8, or cpu: this machine",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the chips' peak, assumed for a step and for embedding (default: 0.5; the paper's 0.33 is shown too)",
    )
    parser.add_argument("--price", type=float, default=0.0, metavar="USD", help="of one chip for an hour")
    parser.add_argument(
        "--no-search", action="store_true", help="the config as it is; look for no faster way"
    )
    parser.add_argument(
        "--largest-batch", action="store_true", help="look for the largest batch that fits as well"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the same as JSON")
    add_overrides(parser)

    def run(args: argparse.Namespace) -> None:
        if not 0 < args.mfu <= 1:
            raise UserError(f"--mfu {args.mfu} must be above 0 and at most 1, such as 0.4")
        if not 0 <= args.price < math.inf:
            raise UserError(f"--price {args.price} must be a price in USD")
        check_output(args.json)
        config = load_config(args.config, overrides(args))

        from lit_fast.train.plan.plan import make_plan
        from lit_fast.train.plan.report import format_plan
        from lit_fast.train.plan.target import open_target

        found = make_plan(
            config,
            open_target(args.topology),
            mfu=args.mfu,
            price=args.price,
            searched=not args.no_search,
            largest=args.largest_batch,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        print(format_plan(found))
        write_json_output(args.json, {"config": str(args.config)} | found)

    return run
