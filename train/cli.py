"""The subcommands `train`, `race` and `plan`."""

from __future__ import annotations

import argparse
import math

from lit_fast.cli.main import Run
from lit_fast.cli.options import (
    add_overrides,
    check_output,
    overrides,
    reuse_memory,
    start_jax,
    write_json_output,
    write_output,
)
from lit_fast.config_io import load_config, recipes
from lit_fast.errors import UserError
from lit_fast.utils.output import result, status


def train(parser: argparse.ArgumentParser) -> Run:
    """Train a text tower against the stored features of a dataset.

    The same command resumes an interrupted run. Every key of the configuration is a flag, listed below.

    Example: lit-fast train siglit_b8_one_day --workdir runs/b8 --dataset data/pairs --optimizer.learning_rate 3e-4
    """
    _add_config(parser)
    parser.add_argument("--workdir", required=True, metavar="W", help="directory of the run")
    parser.add_argument(
        "--profile-steps",
        default="",
        metavar="A:B",
        help="write a profile of steps A to B to W/profile, for TensorBoard and Perfetto",
    )
    add_overrides(parser)

    def run(args: argparse.Namespace) -> None:
        config = load_config(args.config, overrides(args))

        from lit_fast.runtime import distributed_job
        from lit_fast.train.loop import train as train_run

        reuse_memory()
        with distributed_job():
            start_jax()
            train_run(config, args.workdir, args.profile_steps)

    return run


def race(parser: argparse.ArgumentParser) -> Run:
    """Train the same configuration on the features of several towers, and rank the towers.

    W gets an ordinary run per tower and seed. The same command resumes; with more towers or seeds it adds runs. Every
    key of the configuration is a flag, listed below.

    Example: lit-fast race flickr8k_cpu --workdir race --dataset data/flickr8k --towers Ti_16,lite0 --seeds 3
    """
    _add_config(parser)
    add = parser.add_argument
    add("--workdir", required=True, metavar="W", help="directory of the runs")
    add("--towers", required=True, metavar="A,B,...", help="names of features of the dataset")
    add("--seeds", type=int, default=3, metavar="N", help="runs per tower (default 3)")
    add(
        "--by",
        default="",
        metavar="FIGURE",
        help="rank by this figure (default: the first accuracy or recall@1)",
    )
    add("--out", metavar="PAGE.html", help="page with ranking and curves (default: W/race.html)")
    add("--json", metavar="OUT", help="write the ranking as JSON")
    add_overrides(parser)

    def run(args: argparse.Namespace) -> None:
        towers = [name for name in args.towers.split(",") if name]
        if not towers or args.seeds < 1:
            raise UserError("--towers and --seeds need at least one tower and one seed; give them")
        check_output(args.json)
        check_output(args.out, "--out")
        config = load_config(args.config, overrides(args))

        from lit_fast.report.race import as_json, format_race, race_page, rank
        from lit_fast.runtime import distributed_job
        from lit_fast.storage.paths import join
        from lit_fast.train.race import race as run_race

        reuse_memory()
        with distributed_job():
            start_jax()
            records = run_race(config, args.workdir, towers, args.seeds)
        ranking, by = rank(dict(records), args.by)
        result(format_race(ranking, by))
        write_output(args.out or join(args.workdir, "race.html"), race_page(ranking, by).encode(), "--out")
        write_json_output(args.json, as_json(ranking, by))

    return run


def plan(parser: argparse.ArgumentParser) -> Run:
    """Estimate whether a training fits in device memory, its time and price, for one slice or several.

    The training step is compiled ahead of time; no TPU or GPU is needed (pip install 'lit-fast[tpu,plan-gpu]').
    Without the compiler for GPUs their figures are estimates. Nothing is trained and no data are needed: section
    [plan] of the configuration describes them, unless --dataset D is given.

    Example: lit-fast plan siglit_b8_one_day --topology v4-8,v6e-4,h200 --price v4=3.22,v6e=2.7,h200=3.5
    """
    _add_config(parser)
    add = parser.add_argument
    add(
        "--topology",
        required=True,
        metavar="SLICE[,SLICE...]",
        help="names of the cloud (v4-8, v5litepod-4, v5p-8, v6e-4, a3-highgpu-8g), v4:2x2x1, h200, gpu:h100:8, or cpu "
        "for this machine; several are compared, a line each",
    )
    add(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="share of the peak to plan by (default: the compiler's estimate; without one the paper's 0.33)",
    )
    add(
        "--price",
        action="append",
        default=[],
        metavar="USD",
        help="price of a chip per hour: 3.22, or by slice or chip, v4=3.22,h200=3.5; may be repeated",
    )
    add(
        "--storage-price",
        type=float,
        metavar="USD",
        help="price of a GB of storage per month (default 0.02, a list price of 2025)",
    )
    add(
        "--no-search",
        action="store_true",
        help="plan the configuration as it is and search no faster one; always so for several slices",
    )
    add("--largest-batch", action="store_true", help="find the largest batch that fits; for one slice")
    add("--json", metavar="OUT", help="write the plan as JSON")
    add_overrides(parser)

    return _plan


def _plan(args: argparse.Namespace) -> None:
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1, such as 0.4, not {args.mfu}")
    if args.storage_price is not None and not 0 <= args.storage_price < math.inf:
        raise UserError(f"--storage-price must be a price in USD, not {args.storage_price}")
    topologies = list(dict.fromkeys(name for part in args.topology.split(",") if (name := part.strip())))
    if not topologies:
        raise UserError("--topology names no slice; write for example v4-8,h200")
    if args.largest_batch and len(topologies) > 1:
        raise UserError("--largest-batch needs one slice; give one --topology")
    check_output(args.json)
    config = load_config(args.config, overrides(args))

    from lit_fast.train.plan.comparison import compare_slices, format_comparison
    from lit_fast.train.plan.costs import STORAGE_PRICE, Prices
    from lit_fast.train.plan.plan import make_plan
    from lit_fast.train.plan.report import format_plan
    from lit_fast.train.plan.target import open_target, select_platforms

    prices = Prices(args.price)
    storage_price = STORAGE_PRICE if args.storage_price is None else args.storage_price
    select_platforms(topologies)
    start_jax()
    if len(topologies) == 1:
        target = open_target(topologies[0])
        found = make_plan(
            config,
            target,
            mfu=args.mfu,
            price=prices.of(target),
            storage_price=storage_price,
            searched=not args.no_search,
            largest=args.largest_batch,
        )
        result(format_plan(found))
    else:
        found = compare_slices(config, topologies, prices, mfu=args.mfu, storage_price=storage_price)
        result(format_comparison(found))
    if unused := prices.unused():
        status(f"--price: no slice has the price of {', '.join(unused)}")
    write_json_output(args.json, {"config": args.config} | found)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help=f"a TOML file, or a packaged recipe: {', '.join(recipes())}"
    )
