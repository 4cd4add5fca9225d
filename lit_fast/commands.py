"""The commands `eval`, `info`, `compare`, `towers` and `demo`: their arguments and what they print.

What they import is imported when they run, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lit_fast.cli import Run
from lit_fast.errors import UserError


def evaluate(parser: argparse.ArgumentParser) -> Run:
    """Evaluate a run: zero-shot classification and image-text retrieval.

    The datasets must have been embedded by the tower that the run was trained with. Every figure comes
    with the chance level and a 95 % interval.
    """
    parser.add_argument("run", type=Path, metavar="W", help="directory of a run")
    for task, what in (("zero-shot", "labels and class names"), ("retrieval", "captions")):
        parser.add_argument(
            f"--{task}",
            nargs="+",
            action="extend",
            default=[],
            type=Path,
            metavar="E",
            help=f"datasets with {what}",
        )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="write the result as CLIP_benchmark does; several as a list of them",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
    parser.add_argument("--average", action="store_true", help="the average of the weights, if one was kept")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.compiled import keep_compiled

        keep_compiled()
        _evaluate(args.run, args.zero_shot, args.retrieval, args.json, args.step, args.average)

    return run


def _evaluate(
    path: Path,
    zero_shot: list[Path],
    retrieval: list[Path],
    out: Path | None,
    step: int | None,
    average: bool,
) -> None:
    from lit_fast.dataset import open_dataset
    from lit_fast.evaluate import (
        check_retrieval,
        check_zero_shot,
        evaluate_retrieval,
        evaluate_zero_shot,
        format_table,
    )
    from lit_fast.run import check_run, matching_features, open_run, read_tower

    # --- whatever can be wrong is found before the weights are loaded
    if not zero_shot and not retrieval:
        raise UserError("nothing to evaluate; give datasets with --zero-shot E or --retrieval E")
    _check_output(out)
    check_run(path)
    tower = read_tower(path)
    jobs = []
    for datasets, check, measure in (
        (zero_shot, check_zero_shot, evaluate_zero_shot),
        (retrieval, check_retrieval, evaluate_retrieval),
    ):
        for directory in datasets:
            dataset = open_dataset(directory)
            check(dataset)
            matching_features(dataset, tower).invalid_rows()
            jobs.append((dataset, measure))

    # --- evaluate
    run = open_run(path, step, average)
    results = []
    for dataset, measure in jobs:
        print(f"evaluating {dataset.path}", file=sys.stderr, flush=True)
        result = measure(dataset, *run.image_embeddings(dataset), run.embed_text)
        results.append(result | {"model": run.name, "pretrained": f"step {run.step}{' average' * average}"})
    print(f"{run.name}, step {run.step}, tower {run.tower}\n\n{format_table(results)}")
    # CLIP_benchmark keeps one object in a file and cannot read a list.
    _write(out, results[0] if len(results) == 1 else results)


def info(parser: argparse.ArgumentParser) -> Run:
    """Show what a dataset or a run holds, what is missing and the command that makes it."""
    parser.add_argument("path", type=Path, metavar="PATH", help="directory of a dataset or a run")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the same as JSON")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.info import format_info, gather

        _check_output(args.json)
        value = gather(args.path)
        print(format_info(value))
        _write(args.json, value)

    return run


def compare(parser: argparse.ArgumentParser) -> Run:
    """Show runs side by side: what was set differently, what they took and what came out.

    Runs that are still at work, or were killed, are shown as far as they are.
    """
    parser.add_argument("runs", type=Path, nargs="+", metavar="W", help="directories of runs")
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="write the same, and all of the configs, as JSON"
    )
    parser.add_argument("--out", type=Path, metavar="PAGE.html", help="write a page with the curves")

    def run(args: argparse.Namespace) -> None:
        import shutil

        from lit_fast.compare import as_json, comparison_page, format_comparison, read_records

        _check_output(args.json)
        _check_output(args.out, "--out")
        records = read_records(args.runs)
        print(format_comparison(records, shutil.get_terminal_size((120, 24)).columns))
        _write(args.json, as_json(records))
        if args.out:
            _write_bytes(args.out, comparison_page(records).encode(), "--out")

    return run


def towers(parser: argparse.ArgumentParser) -> Run:
    """List public vision towers: what they make, what they cost, whose they are.

    Every name works as `lit-fast embed --tower NAME`. GFLOPs are per image, two operations per
    multiply-add; parameters are those without the classifier.
    """
    parser.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of name or family")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.known_towers import format_towers, known_towers

        word = args.pattern.lower()
        found = [t for t in known_towers() if word in t.name.lower() or word in t.family.lower()]
        if not found:
            raise UserError(f"no known tower has {args.pattern!r} in its name; without it all are listed")
        print(format_towers(found))

    return run


def demo(parser: argparse.ArgumentParser) -> Run:
    """Show the whole way on pictures that it draws itself, in minutes on a laptop."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.demo import run_demo

        run_demo(args.out)

    return run


def _check_output(path: Path | None, option: str = "--json") -> None:
    """Find out before the work whether its result can be written."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path} is a directory; give the name of a file")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written: {parent} is not a writable directory")


def _write(path: Path | None, value: object) -> None:
    from lit_fast.files import json_bytes

    if path is not None:
        _write_bytes(path, json_bytes(value), "--json")


def _write_bytes(path: Path, data: bytes, option: str) -> None:
    from lit_fast.files import write_atomic

    try:
        write_atomic(path, data)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}") from None
