"""The subcommand `export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lit_fast.cli.main import Run
from lit_fast.errors import UserError

# What --format takes, and the module that writes it.
FORMATS = {
    "lit_fast": "lit_fast.train.export.native",
    "big_vision": "lit_fast.train.export.big_vision",
    "open_clip": "lit_fast.train.export.open_clip",
    "transformers": "lit_fast.train.export.transformers",
    "onnx": "lit_fast.train.export.onnx",
}
# The options that only one format takes; its functions take them by these names.
_OPTIONS = {"onnx": ("vision", "classes", "templates"), "open_clip": ("nearest_pixels",)}


def export(parser: argparse.ArgumentParser) -> Run:
    """Export a trained model: both towers, the tokenizer and a model card.

    lit_fast: a folder that `lit_fast.load` reads. big_vision: an .npz. open_clip and transformers: a folder that
    these packages load. onnx: graphs. What a format cannot express is said before anything is written.
    """
    parser.add_argument("run", type=Path, metavar="W", help="directory of a run, or of an exported model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--format", choices=FORMATS, default="lit_fast", help="default: lit_fast")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
    parser.add_argument("--average", action="store_true", help="the average of the weights, if one was kept")
    parser.add_argument("--tower", metavar="FILE", help="the vision tower's weights, where they have moved")
    parser.add_argument("--vision", action="store_true", help="onnx: the vision tower too")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="onnx: a zero-shot head of these names")
    parser.add_argument("--templates", type=Path, metavar="FILE", help="onnx: prompts for --classes")
    parser.add_argument(
        "--nearest-pixels",
        action="store_true",
        help="open_clip: where it cannot make the very pixels that the tower was trained with, the nearest it can",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub, as private")
    parser.add_argument("--public", action="store_true", help="with --push: for all to see")

    def run(args: argparse.Namespace) -> None:
        from dataclasses import replace

        from lit_fast.cli.options import enable_compilation_cache
        from lit_fast.inference.model import load
        from lit_fast.train.export.writer import check_folder, check_push, push, write_folder

        # --- whatever can be wrong is found before the weights are loaded
        options = _options(args)
        check_folder(args.out)
        if args.push:
            check_push(args.push)
        elif args.public:
            raise UserError("--public is for --push OWNER/NAME; without it nothing is uploaded")

        # --- write, and upload if asked to
        enable_compilation_cache()
        model = load(args.run, step=args.step, average=args.average, tower=args.tower)
        model = replace(model, name=args.push or args.out.resolve().name)  # by which others will load it
        write_folder(FORMATS[args.format], model, args.out, options)
        if args.push:
            push(args.out, args.push, args.public)

    return run


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the format.

    Raises:
      UserError: one of another format was given.
    """
    given: dict[str, Any] = {}
    for owner, names in _OPTIONS.items():
        for name in names:
            if getattr(args, name) and args.format != owner:
                raise UserError(f"--{name.replace('_', '-')} is for --format {owner}")
            if getattr(args, name):
                given[name] = getattr(args, name)
    return given
