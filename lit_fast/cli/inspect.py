"""The subcommands `info`, `compare`, `towers` and `demo`. Their imports are inside the functions: `--help` is fast."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lit_fast.cli.main import Run
from lit_fast.cli.options import check_output, write_json_output, write_output
from lit_fast.errors import UserError
from lit_fast.utils.output import result, status

if TYPE_CHECKING:
    from lit_fast.weights.registry import TowerRow


def info(parser: argparse.ArgumentParser) -> Run:
    """Show the contents of a dataset or run, what is missing and the command that creates it.

    Example: lit-fast info data/pairs
    """
    parser.add_argument("path", metavar="PATH", help="directory of a dataset or a run")
    parser.add_argument("--json", metavar="OUT", help="write the same as JSON")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.report.info import format_info, gather

        check_output(args.json)
        value = gather(args.path)
        result(format_info(value))
        write_json_output(args.json, value)

    return run


def compare(parser: argparse.ArgumentParser) -> Run:
    """Compare runs: configuration, cost and results.

    Running and interrupted runs are included up to their last record.

    Example: lit-fast compare runs/* --out compare.html
    """
    parser.add_argument("runs", nargs="+", metavar="W", help="directories of runs")
    parser.add_argument("--json", metavar="OUT", help="write the same, and the full configurations, as JSON")
    parser.add_argument("--out", metavar="PAGE.html", help="write a page with the curves")

    def run(args: argparse.Namespace) -> None:
        import shutil

        from lit_fast.report.compare import as_json, comparison_page, format_comparison, read_records

        check_output(args.json)
        check_output(args.out, "--out")
        records = read_records(args.runs)
        result(format_comparison(records, shutil.get_terminal_size((120, 24)).columns))
        write_json_output(args.json, as_json(records))
        if args.out:
            write_output(args.out, comparison_page(records).encode("utf-8", "replace"), "--out")

    return run


def towers(parser: argparse.ArgumentParser) -> Run:
    """List public vision towers: architecture, size, cost and licence.

    Each name can be used as `lit-fast embed --tower NAME`. GFLOPs are per image, with two operations per
    multiply-add; parameters are without the classifier. With a PATTERN, models of timm and open_clip are listed too
    if they are installed (pip install 'lit-fast[torch]').

    Example: lit-fast towers dinov2
    """
    parser.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of a name or family")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.weights.registry import format_towers, known_rows, known_towers

        word = args.pattern.lower()
        found = known_rows([t for t in known_towers() if word in t.name.lower() or word in t.family.lower()])
        others, note = _installed_towers(word) if word else ([], "")
        found += others
        if not found:
            hint = f" ({note})" if note else ""
            raise UserError(
                f"no known tower has {args.pattern!r} in its name{hint}; leave it out to list all"
            )
        if note:
            status(f"note: {note}")
        result(format_towers(found))

    return run


def _installed_towers(word: str) -> tuple[list[TowerRow], str]:
    """Return the towers of timm and open_clip with a word in their names, and a note on what is missing."""
    from lit_fast.towers.torch.packages import installed

    if not installed("torchax"):
        return [], ""
    from lit_fast.towers.torch.catalogue import published_towers

    try:
        found = published_towers(word)
    except UserError as error:
        return [], f"models of timm and open_clip are not listed: {error}"
    notes = []
    if found.unmeasured:
        notes.append(
            f"figures of {found.unmeasured:,} models were not computed, a longer PATTERN computes them"
        )
    if found.unusual:
        notes.append(f"{found.unusual} models that need --preprocess are left out")
    return found.rows, "; ".join(notes)


def demo(parser: argparse.ArgumentParser) -> Run:
    """Run all stages on generated images, in minutes on a laptop.

    Example: lit-fast demo --out demo
    """
    parser.add_argument("--out", default="demo", metavar="DIR", help="output directory (default: demo)")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.demo.demo import run_demo

        run_demo(args.out)

    return run
