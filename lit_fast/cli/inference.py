"""The subcommands `classify`, `search` and `serve`. Their imports are inside the functions: `--help` must be fast."""

from __future__ import annotations

import argparse
import os

from lit_fast.cli.main import Run
from lit_fast.cli.options import check_output, start_jax, write_json_output, write_output
from lit_fast.errors import UserError
from lit_fast.storage.text_files import read_lines
from lit_fast.utils.output import result, status

_MODEL = "LIT_FAST_MODEL"


def classify(parser: argparse.ArgumentParser) -> Run:
    """Classify images with a trained model and any labels.

    Labels are embedded as in zero-shot evaluation. A score is the probability of the label alone with the sigmoid
    loss, and its share among the given labels with the softmax loss. Images that cannot be read are listed at the
    end, with exit status 2.

    Example: lit-fast classify photos/ --model runs/b8 --labels "a dog,a cat"
    """
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or directories of them")
    _add_model(parser)
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="LABEL,LABEL", help="the labels, separated by commas")
    labels.add_argument("--labels-file", metavar="FILE", help="a file with one label per line")
    parser.add_argument(
        "--templates",
        metavar="FILE",
        help="prompts with {c} for the label, one per line (default: the label)",
    )
    parser.add_argument("--json", metavar="OUT", help="write all scores to a file")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.inference.classify import (
            as_json,
            check_labels,
            describe_scores,
            expand_images,
            format_scores,
        )
        from lit_fast.inference.classify import classify as classify_images
        from lit_fast.inference.load import load

        _check_model(args)
        check_output(args.json)
        if args.labels_file:
            labels = list(read_lines(args.labels_file))
        else:
            labels = [label.strip() for label in args.labels.split(",") if label.strip()]
        templates = list(read_lines(args.templates)) if args.templates else ["{c}"]
        check_labels(labels, templates)
        images = expand_images(args.images)
        start_jax()
        model = load(args.model, tower=args.tower)
        scores, problems = classify_images(model, images, labels, templates)
        result(f"{model.name}: {describe_scores(model)}\n{format_scores(images, labels, scores)}")
        write_json_output(args.json, as_json(model, images, labels, scores, problems))
        if problems:
            first, *others = problems.values()
            for problem in others:
                status(problem)
            raise UserError(f"{first} ({len(problems):,} of {len(images):,} images failed)")

    return run


def search(parser: argparse.ArgumentParser) -> Run:
    """Search the images of a dataset by text or image.

    The query is compared with every stored feature: the result is exact. Of equal cosines the lower row is first.
    The dataset must have features of the model's tower. The page shows the images if the sources are available.

    Example: lit-fast search data/pairs "a dog in the snow" --model runs/b8 --page found.html
    """
    parser.add_argument("dataset", metavar="D", help="an embedded dataset")
    parser.add_argument("queries", nargs="*", default=[], metavar="QUERY", help="texts")
    _add_model(parser)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image as a query")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows per query (default 20)")
    parser.add_argument("--page", metavar="OUT.html", help="write a page with the images")
    parser.add_argument("--json", metavar="OUT", help="write the rows to a file")
    parser.set_defaults(takes_overrides=True)  # argparse accepts no positional arguments after an option

    def run(args: argparse.Namespace) -> None:
        if options := [word for word in args.unknown if word.startswith("-")]:
            parser.error(f"unrecognized arguments: {' '.join(options)}")
        args.queries += args.unknown
        _check_model(args)
        if not args.queries and not args.image:
            raise UserError("the query is missing; give a text, or an image with --image FILE")
        if not all(query.strip() for query in args.queries):
            raise UserError("a query is empty; give a text")
        if args.top < 1:
            raise UserError(f"--top must be at least 1, not {args.top}")
        check_output(args.json)
        check_output(args.page, "--page")
        _search(args)

    return run


def serve(parser: argparse.ArgumentParser) -> Run:
    """Search a dataset in the browser: type a text or drop an image.

    Only this machine can open the page, unless --host names another address; there is no password. Ctrl-C stops it.

    Example: lit-fast serve runs/b8 data/pairs
    """
    parser.add_argument("model", metavar="W", help="a run, an exported model, or hf:OWNER/NAME")
    parser.add_argument("dataset", metavar="D", help="an embedded dataset")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0: any free port")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1")
    parser.add_argument(
        "--tower", metavar="NAME|PATH", help="weights of the vision tower, if they were moved"
    )

    def run(args: argparse.Namespace) -> None:
        from lit_fast.data.dataset import open_dataset
        from lit_fast.inference.load import load
        from lit_fast.inference.searcher import Searcher
        from lit_fast.inference.serve import SearchServer

        dataset = open_dataset(args.dataset)
        start_jax()
        model = load(args.model, tower=args.tower)
        if args.tower:  # otherwise it is loaded for the first image
            _ = model.tower
        searcher = Searcher(model, dataset)
        with SearchServer(args.host, args.port, searcher) as server:
            searcher.answer(["warm up"])  # compiles the text tower before the first request
            if not server.is_local:
                status(f"warning: anyone who can reach {server.url} can see the images; there is no password")
            result(f"searching {dataset.name} with {searcher.model.name} at {server.url} (Ctrl-C stops)")
            server.serve_forever()

    return run


def _search(args: argparse.Namespace) -> None:
    import shutil

    from lit_fast.data.dataset import open_dataset
    from lit_fast.data.images.reader import ImageReader
    from lit_fast.inference.load import load
    from lit_fast.inference.search_page import as_json, format_answers, search_page
    from lit_fast.inference.searcher import Searcher

    dataset = open_dataset(args.dataset)
    start_jax()
    model = load(args.model, tower=args.tower)
    answers = Searcher(model, dataset).answer(args.queries, {image: image for image in args.image}, args.top)
    result(format_answers(answers, shutil.get_terminal_size((160, 24)).columns))
    write_json_output(args.json, as_json(answers))
    if args.page:
        note = f"Found by {model.name}, step {model.step}, among the {dataset.rows:,} rows of {dataset.name}."
        page = search_page(f"Search in {dataset.name}", note, answers, ImageReader(dataset).read_or_none)
        write_output(args.page, page.encode("utf-8", "replace"), "--page")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=os.environ.get(_MODEL) or None,
        metavar="W",
        help=f"a run, an exported model, or hf:OWNER/NAME (default: ${_MODEL})",
    )
    parser.add_argument(
        "--tower", metavar="NAME|PATH", help="weights of the vision tower, if they were moved"
    )


def _check_model(args: argparse.Namespace) -> None:
    if args.model is None:
        raise UserError(
            f"the model is missing; add --model W with a run or a directory of lit-fast export, or set {_MODEL}"
        )
