"""The subcommand `eval`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_fast.cli.main import Run
from lit_fast.cli.options import check_output, start_jax, write_json_output, write_output
from lit_fast.errors import UserError
from lit_fast.storage.files import is_directory
from lit_fast.storage.paths import join
from lit_fast.utils import output

if TYPE_CHECKING:
    from markupsafe import Markup

    from lit_fast.data.dataset import Dataset
    from lit_fast.evaluation.evaluate import Evaluate


def evaluate(parser: argparse.ArgumentParser) -> Run:
    """Evaluate a run: zero-shot and few-shot classification, image-text retrieval.

    The datasets must be embedded by the tower of the run, unless it trained its image tower, which embeds the images;
    `lit-fast index wds:NAME` downloads public ones. Each metric has its chance level and a 95 % interval. Retrieval
    with captions in several languages is evaluated per language and averaged.

    Example: lit-fast eval runs/b8 --zero-shot data/imagenet-val --retrieval data/coco-val --json eval.json
    """
    parser.add_argument("run", metavar="W", help="directory of a run")
    parser.add_argument(
        "--zero-shot",
        nargs="+",
        action="extend",
        default=[],
        metavar="E",
        help="datasets with labels and class names",
    )
    parser.add_argument(
        "--retrieval", nargs="+", action="extend", default=[], metavar="E", help="datasets with captions"
    )
    parser.add_argument(
        "--few-shot",
        nargs=2,
        action="append",
        default=[],
        metavar=("TRAIN", "TEST"),
        help="datasets with labels of the same classes; this depends on the tower only and is computed once",
    )
    parser.add_argument(
        "--classnames", metavar="FILE", help="class names, one per line, instead of those of the datasets"
    )
    parser.add_argument(
        "--templates", metavar="FILE", help="prompt templates, one per line, instead of those of the datasets"
    )
    parser.add_argument(
        "--labels",
        metavar="FILE.json",
        help="several classes per image: an object from keys to lists, or the list of ReaL; `real` downloads it",
    )
    parser.add_argument(
        "--classes",
        choices=("all", "present"),
        default="all",
        help="candidates: all classes, or those of at least one image (ImageNet-A and -R among 1000)",
    )
    parser.add_argument(
        "--json",
        metavar="OUT",
        help="write the results as CLIP_benchmark does: to a file (several results as a list), or to an existing "
        "directory with one file per result, as `clip_benchmark build` reads them",
    )
    parser.add_argument("--page", metavar="OUT.html", help="write a page with metrics, confusions and images")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
    parser.add_argument(
        "--average", action="store_true", help="evaluate the average of the weights, if the run has one"
    )

    return _evaluate


def _evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    from lit_fast.evaluation.evaluate import distinct_names
    from lit_fast.evaluation.table import format_results
    from lit_fast.report.evaluation_page import MAX_PICTURES, evaluation_page, few_shot_section, memoized
    from lit_fast.runs.run import open_run

    # --- find every mistake before the weights are loaded
    _check_arguments(args)
    jobs, pairs = _open_datasets(args)

    start_jax()
    from lit_fast.inference.run_images import RunImages

    run = open_run(args.run, args.step, args.average)
    run_images = RunImages(run)

    # --- few-shot: needs the vision tower alone
    few_shot = []
    names = iter(distinct_names(dataset.path for pair in pairs for dataset in pair))
    for train, test in pairs:
        output.status(f"evaluating {test.path} few-shot")
        result = run_images.few_shot(train, test)
        few_shot.append(result | {"train_dataset": next(names), "dataset": next(names)})

    # --- zero-shot and retrieval
    model = {"model": run.name, "pretrained": f"step {run.step}{' average' * args.average}"}
    results, page = [], []
    for name, (dataset, measure, section) in zip(
        distinct_names(job.dataset.path for job in jobs), jobs, strict=True
    ):
        output.status(f"evaluating {dataset.path}")
        embed_text = memoized(run.embed_text) if args.page else run.embed_text
        embedded = (*run_images.embeddings(dataset), embed_text)
        found = [result | model | {"dataset": name} for result in measure(*embedded)]
        results += found
        if args.page:
            page.append(section(found, dataset, *embedded, max_pictures=MAX_PICTURES // len(jobs)))
    results += [result | model for result in few_shot]
    page += [few_shot_section(result) for result in few_shot]
    output.result(f"{run.name}, step {run.step}, tower {run.tower}\n\n{format_results(results)}")
    _write_results(args.json, results)
    if args.page:
        about = f"{model['pretrained']}, tower {run.tower}"
        write_output(args.page, evaluation_page(run.name, about, page).encode("utf-8", "replace"), "--page")
    return results


class _Job(NamedTuple):
    """A dataset, and how it is evaluated and shown."""

    dataset: Dataset
    measure: Evaluate
    section: Callable[..., Markup]  # of the page


def _check_arguments(args: argparse.Namespace) -> None:
    from lit_fast.runs.run import check_run

    if not args.zero_shot and not args.retrieval and not args.few_shot:
        raise UserError(
            "nothing to evaluate; give datasets with --zero-shot E or --retrieval E, or --few-shot TRAIN TEST"
        )
    if not args.zero_shot and (args.classnames or args.templates or args.labels or args.classes != "all"):
        raise UserError("--classnames, --templates, --labels and --classes need --zero-shot E; add it")
    if args.json is None or not is_directory(args.json):
        check_output(args.json)
    check_output(args.page, "--page")
    check_run(args.run)


def _open_datasets(args: argparse.Namespace) -> tuple[list[_Job], list[tuple[Dataset, Dataset]]]:
    """Open all datasets and check them.

    Returns:
      Those of zero-shot classification and retrieval, and the pairs of few-shot classification.
    """
    from lit_fast.data.dataset import open_dataset
    from lit_fast.data.features import rows_without_features
    from lit_fast.data.images.sources import check_sources
    from lit_fast.evaluation.evaluate import retrieval_evaluation, zero_shot_evaluation
    from lit_fast.evaluation.few_shot import check_few_shot
    from lit_fast.evaluation.known_sets import resolve_labels
    from lit_fast.report.evaluation_page import retrieval_section, zero_shot_section
    from lit_fast.runs.run import read_config, read_tower

    tower, trained = read_tower(args.run), read_config(args.run).image.trained

    def invalid_rows(dataset: Dataset) -> set[int]:
        if not trained:
            return rows_without_features(dataset, tower)
        check_sources(dataset)  # the images are embedded
        return set()

    files = {
        "classnames": args.classnames,
        "templates": args.templates,
        "labels": resolve_labels(args.labels) if args.labels else None,
        "present": args.classes == "present",
    }
    jobs = []
    for paths, evaluation, section, options in (
        (args.zero_shot, zero_shot_evaluation, zero_shot_section, files),
        (args.retrieval, retrieval_evaluation, retrieval_section, {}),
    ):
        for path in paths:
            dataset = open_dataset(path)
            measure = evaluation(dataset, partial(invalid_rows, dataset), **options)
            jobs.append(_Job(dataset, measure, partial(section, **options)))
    pairs = [(open_dataset(train), open_dataset(test)) for train, test in args.few_shot]
    for pair in pairs:
        check_few_shot(*pair)
        for dataset in pair:
            invalid_rows(dataset)
    return jobs, pairs


def _write_results(out: str | None, results: list[dict[str, Any]]) -> None:
    """Write one file, or one per result into a directory, which is all that CLIP_benchmark can read.

    The name of a file has the settings that replace those of the dataset, so that results with other labels or
    templates are not overwritten.
    """
    from lit_fast.evaluation.evaluate import SETTINGS
    from lit_fast.evaluation.zeroshot_set import OWN_TEMPLATES

    if out is None or not is_directory(out):
        write_json_output(out, results[0] if len(results) == 1 else results)
        return
    keys = ("dataset", "pretrained", "model", "language", "task", "train_dataset", *SETTINGS)
    for result in results:
        default = "template_set" if result.get("template_set") in OWN_TEMPLATES else ""
        parts = (str(result[key]) for key in keys if key != default and result.get(key))
        write_json_output(join(out, "_".join(parts).replace("/", "_").replace(" ", "_") + ".json"), result)
