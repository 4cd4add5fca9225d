"""The commands `eval`, `info`, `compare`, `towers` and `demo`: their arguments and what they print.

What they import is imported when they run, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_fast.cli.main import Run
from lit_fast.cli.options import check_output, write_json_output, write_output
from lit_fast.errors import UserError


def info(parser: argparse.ArgumentParser) -> Run:
    """Show what a dataset or a run holds, what is missing and the command that makes it."""
    parser.add_argument("path", type=Path, metavar="PATH", help="directory of a dataset or a run")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the same as JSON")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.report.info import gather
        from lit_fast.report.info_text import format_info

        check_output(args.json)
        value = gather(args.path)
        print(format_info(value))
        write_json_output(args.json, value)

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

        from lit_fast.report.compare import as_json, comparison_page, format_comparison, read_records

        check_output(args.json)
        check_output(args.out, "--out")
        records = read_records(args.runs)
        print(format_comparison(records, shutil.get_terminal_size((120, 24)).columns))
        write_json_output(args.json, as_json(records))
        if args.out:
            write_output(args.out, comparison_page(records).encode(), "--out")

    return run


def towers(parser: argparse.ArgumentParser) -> Run:
    """List public vision towers: what they make, what they cost, whose they are.

    Every name works as `lit-fast embed --tower NAME`. GFLOPs are per image, two operations per
    multiply-add; parameters are those without the classifier.
    """
    parser.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of name or family")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.weights.registry import format_towers, known_towers

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
        from lit_fast.demo.demo import run_demo

        run_demo(args.out)

    return run
