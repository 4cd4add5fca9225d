"""The subcommand `export`."""

from __future__ import annotations

import argparse

from lit_fast.cli.main import Run
from lit_fast.errors import UserError
from lit_fast.train.export.writer import FORMATS


def export(parser: argparse.ArgumentParser) -> Run:
    """Export a trained model: both towers, the tokenizer and a model card.

    lit_fast: a directory that `lit_fast.load` reads. big_vision: an .npz. open_clip and transformers: a directory
    that these packages load. onnx: graphs. If a format cannot express the model, the command fails before it writes.

    Example: lit-fast export runs/b8 --format open_clip --out exported
    """
    parser.add_argument("run", metavar="W", help="a run, an exported model, or hf:OWNER/NAME")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--format", choices=FORMATS, default="lit_fast", help="default: lit_fast")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
    parser.add_argument("--average", action="store_true", help="the average of the weights, if one was kept")
    parser.add_argument("--tower", metavar="FILE", help="the vision tower's weights, if they have moved")
    parser.add_argument("--vision", action="store_true", help="onnx: export the vision tower too")
    parser.add_argument("--classes", metavar="FILE", help="onnx: write a zero-shot head of these class names")
    parser.add_argument("--templates", metavar="FILE", help="onnx: prompt templates for --classes")
    parser.add_argument(
        "--nearest-pixels",
        action="store_true",
        help="open_clip: if it cannot reproduce the tower's preprocessing, use the nearest that it has",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to the Hugging Face Hub, as private")
    parser.add_argument("--public", action="store_true", help="with --push: create a public repository")

    def run(args: argparse.Namespace) -> None:
        from dataclasses import replace

        from lit_fast.cli.options import start_jax
        from lit_fast.inference.load import load
        from lit_fast.storage.paths import absolute, name
        from lit_fast.train.export.writer import (
            ExportOptions,
            check_directory,
            check_options,
            check_push,
            lock_directory,
            push,
            write_directory,
        )

        # Check all arguments before the weights are loaded.
        options = ExportOptions(args.vision, args.classes, args.templates, args.nearest_pixels)
        check_options(args.format, options)
        check_directory(args.out)
        if args.push:
            check_push(args.push)
        elif args.public:
            raise UserError("--public is for --push OWNER/NAME; without it nothing is uploaded")

        with lock_directory(args.out):
            start_jax()
            model = load(args.run, step=args.step, average=args.average, tower=args.tower)
            model = replace(model, name=args.push or name(absolute(args.out)))  # the name others load it by
            write_directory(args.format, model, args.out, options)
            if args.push:
                push(args.out, args.push, args.public)

    return run
