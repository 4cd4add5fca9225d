"""The commands `classify` and `search`: their arguments and what they print.

What they import is imported when they run, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lit_fast.cli.main import Run
from lit_fast.cli.options import check_output, write_json_output, write_output
from lit_fast.errors import UserError

_MODEL = "LIT_FAST_MODEL"


def classify(parser: argparse.ArgumentParser) -> Run:
    """Say which labels fit which images, with a trained model.

    Every label is embedded as in zero-shot evaluation. With the sigmoid loss a score is the label's own
    probability, with the softmax loss its share among the labels given. An image that cannot be read is named,
    the others go on, and the exit status is 2.
    """
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, or directories of them")
    _add_model(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--labels", metavar="LABEL,LABEL", help="the labels, separated by commas")
    which.add_argument("--labels-file", type=Path, metavar="FILE", help="one label a line")
    parser.add_argument(
        "--templates", type=Path, metavar="FILE", help="prompts, {c} for the label; default: it alone"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all scores to a file")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.cli.options import enable_compilation_cache
        from lit_fast.inference.classify import (
            as_json,
            check_labels,
            describe_scores,
            expand_images,
            format_scores,
        )
        from lit_fast.inference.classify import classify as scores_of
        from lit_fast.inference.model import load
        from lit_fast.storage.files import read_lines

        _check_model(args)
        check_output(args.json)
        if args.labels_file:
            labels = list(read_lines(args.labels_file))
        else:
            labels = [label.strip() for label in args.labels.split(",") if label.strip()]
        templates = list(read_lines(args.templates)) if args.templates else ["{c}"]
        check_labels(labels, templates)
        images = expand_images(args.images)
        enable_compilation_cache()
        model = load(args.model, tower=args.tower)
        scores, problems = scores_of(model, images, labels, templates)
        print(f"{model.name}: {describe_scores(model)}\n{format_scores(images, labels, scores)}")
        write_json_output(args.json, as_json(model, images, labels, scores, problems))
        if problems:
            for problem in list(problems.values())[1:]:
                print(problem, file=sys.stderr)
            raise UserError(
                f"{next(iter(problems.values()))} ({len(problems):,} of {len(images):,} images failed)"
            )

    return run


def search(parser: argparse.ArgumentParser) -> Run:
    """Find the images of a dataset that are nearest to a text or an image.

    Every stored feature is compared, so the result is exact; of equal cosines the lower row comes first. The
    dataset must hold features of the model's tower. Where its sources are at hand the page shows the pictures.
    """
    parser.add_argument("dataset", type=Path, metavar="D", help="an embedded dataset")
    parser.add_argument("queries", nargs="*", default=[], metavar="QUERY", help="texts")
    _add_model(parser)
    parser.add_argument(
        "--image", action="append", default=[], type=Path, metavar="FILE", help="an image as a query"
    )
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows per query (default 20)")
    parser.add_argument("--page", type=Path, metavar="OUT.html", help="write a page with the pictures")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to a file")
    parser.set_defaults(takes_overrides=True)  # argparse takes no texts after an option

    def run(args: argparse.Namespace) -> None:
        if options := [word for word in args.unknown if word.startswith("-")]:
            parser.error(f"unrecognized arguments: {' '.join(options)}")
        args.queries += args.unknown
        _check_model(args)
        if not args.queries and not args.image:
            raise UserError("nothing to search for; give a text, or an image with --image FILE")
        if not all(query.strip() for query in args.queries):
            raise UserError("a query is empty; give some words")
        if args.top < 1:
            raise UserError(f"--top {args.top} is less than 1")
        check_output(args.json)
        check_output(args.page, "--page")
        _search(args)

    return run


def _search(args: argparse.Namespace) -> None:
    import shutil

    import numpy as np

    from lit_fast.cli.options import enable_compilation_cache
    from lit_fast.data.dataset import open_dataset
    from lit_fast.data.images.reader import ImageReader
    from lit_fast.data.matching import matching_features
    from lit_fast.inference.model import load
    from lit_fast.inference.search import read_hits, search
    from lit_fast.inference.search_page import Answer, as_json, format_answers, search_page

    dataset = open_dataset(args.dataset)
    enable_compilation_cache()
    model = load(args.model, tower=args.tower)
    features = matching_features(dataset, model.tower_json)
    features.invalid_rows()
    queries = np.zeros((0, model.width), np.float32)
    if args.image:
        queries = np.concatenate([queries, model.embed_image(args.image)])
    if args.queries:
        queries = np.concatenate([queries, model.embed_text(args.queries)])
    answers = []
    texts = [("image", str(file)) for file in args.image] + [("text", query) for query in args.queries]
    for (kind, query), found in zip(
        texts, search(features, queries, args.top, model.embed_features), strict=True
    ):
        probabilities = np.zeros(0)
        if kind == "text" and model.loss.name == "sigmoid":
            probabilities = model.probabilities(np.array([[c] for _, c in found], np.float32))[:, 0]
        answers.append(Answer(query, kind, tuple(read_hits(dataset, found)), tuple(probabilities.tolist())))
    print(format_answers(answers, shutil.get_terminal_size((160, 24)).columns))
    write_json_output(args.json, as_json(answers))
    if args.page:
        note = f"Found by {model.name}, step {model.step}, among the {dataset.rows:,} rows of {dataset.name}."
        page = search_page(f"Search in {dataset.name}", note, answers, ImageReader(dataset).read_or_none)
        write_output(args.page, page.encode("utf-8", "replace"), "--page")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=os.environ.get(_MODEL) or None,
        metavar="W",
        help=f"a run, or a folder of lit-fast export (default: ${_MODEL})",
    )
    parser.add_argument(
        "--tower", metavar="NAME|PATH", help="weights of the vision tower, where they have moved"
    )


def _check_model(args: argparse.Namespace) -> None:
    if args.model is None:
        raise UserError(
            f"no model; add --model W with a run or a folder of lit-fast export, or set {_MODEL} to it"
        )
