"""The subcommand `eval`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_fast.cli.main import Run
from lit_fast.cli.options import check_output, write_json_output, write_output
from lit_fast.errors import UserError

if TYPE_CHECKING:
    from markupsafe import Markup

    from lit_fast.data.dataset import Dataset
    from lit_fast.evaluation.evaluate import Evaluate


def evaluate(parser: argparse.ArgumentParser) -> Run:
    """Evaluate a run: zero-shot and few-shot classification and image-text retrieval.

    The datasets must have been embedded by the tower that the run was trained with; `lit-fast index wds:NAME`
    fetches public ones. Every figure comes with the chance level and a 95 % interval. Retrieval from captions in
    several languages is done for each of them and averaged.
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
        "--few-shot",
        nargs=2,
        action="append",
        default=[],
        type=Path,
        metavar=("TRAIN", "TEST"),
        help="datasets with labels of the same classes; a property of the tower, computed once",
    )
    for option, what in (
        ("--classnames", "class names, one per line, in place of the datasets' own"),
        ("--templates", "prompt templates, one per line, in place of the datasets' own"),
    ):
        parser.add_argument(option, type=Path, metavar="FILE", help=what)
    parser.add_argument(
        "--labels",
        metavar="FILE.json",
        help="several classes per image: an object from keys to lists, or ReaL's list; `real` fetches it",
    )
    parser.add_argument(
        "--classes",
        choices=("all", "present"),
        default="all",
        help="candidates: all classes, or those that some image has (ImageNet-A and -R among 1000)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="write the result as CLIP_benchmark does: a file (several results: a list of them), or an existing "
        "directory, which gets one file per result, as `clip_benchmark build` reads them",
    )
    parser.add_argument(
        "--page", type=Path, metavar="OUT.html", help="write a page with figures, confusions and pictures"
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
    parser.add_argument("--average", action="store_true", help="the average of the weights, if one was kept")

    def run(args: argparse.Namespace) -> None:
        from lit_fast.cli.options import enable_compilation_cache

        enable_compilation_cache()
        _evaluate(args)

    return run


def _evaluate(args: argparse.Namespace) -> None:
    from lit_fast.data.dataset import open_dataset
    from lit_fast.data.matching import rows_without_features
    from lit_fast.evaluation.evaluate import distinct_names, retrieval_evaluation, zero_shot_evaluation
    from lit_fast.evaluation.few_shot import check_few_shot, evaluate_few_shot
    from lit_fast.evaluation.known_sets import resolve_labels
    from lit_fast.evaluation.table import format_results
    from lit_fast.report.evaluation_page import (
        MAX_PICTURES,
        evaluation_page,
        few_shot_section,
        memoized,
        retrieval_section,
        zero_shot_section,
    )
    from lit_fast.runs.run import check_run, open_run, read_tower

    # --- whatever can be wrong is found before the weights are loaded
    if not args.zero_shot and not args.retrieval and not args.few_shot:
        raise UserError(
            "nothing to evaluate; give datasets with --zero-shot E or --retrieval E, or --few-shot TRAIN TEST"
        )
    if not args.zero_shot and (args.classnames or args.templates or args.labels or args.classes != "all"):
        raise UserError("--classnames, --templates, --labels and --classes are for --zero-shot E; give one")
    if args.json is None or not args.json.is_dir():
        check_output(args.json)
    check_output(args.page, "--page")
    check_run(args.run)
    tower = read_tower(args.run)
    files = {
        "classnames": args.classnames,
        "templates": args.templates,
        "labels": resolve_labels(args.labels) if args.labels else None,
        "present": args.classes == "present",
    }
    jobs: list[tuple[Dataset, Evaluate, Callable[..., Markup]]] = []
    for paths, evaluation, section, options in (
        (args.zero_shot, zero_shot_evaluation, zero_shot_section, files),
        (args.retrieval, retrieval_evaluation, retrieval_section, {}),
    ):
        for path in paths:
            dataset = open_dataset(path)
            invalid = partial(rows_without_features, dataset, tower)
            jobs.append((dataset, evaluation(dataset, invalid, **options), partial(section, **options)))
    pairs = [(open_dataset(train), open_dataset(test)) for train, test in args.few_shot]
    for pair in pairs:
        check_few_shot(*pair)
        for dataset in pair:
            rows_without_features(dataset, tower)

    # --- few-shot: a property of the tower, so that the weights are not needed
    few_shot = []
    named = iter(distinct_names(dataset.path for pair in pairs for dataset in pair))
    for train, test in pairs:
        print(f"evaluating {test.path} few-shot", file=sys.stderr, flush=True)
        result = evaluate_few_shot(train, test, tower)
        few_shot.append(result | {"train_dataset": next(named), "dataset": next(named)})

    # --- the run's
    run = open_run(args.run, args.step, args.average)
    told = {"model": run.name, "pretrained": f"step {run.step}{' average' * args.average}"}
    results, page = [], []
    for name, (dataset, measure, section) in zip(distinct_names(j[0].path for j in jobs), jobs, strict=True):
        print(f"evaluating {dataset.path}", file=sys.stderr, flush=True)
        embed_text = memoized(run.embed_text) if args.page else run.embed_text
        embedded = (*run.image_embeddings(dataset), embed_text)
        found = [result | told | {"dataset": name} for result in measure(*embedded)]
        results += found
        if args.page:
            page.append(section(found, dataset, *embedded, max_pictures=MAX_PICTURES // len(jobs)))
    results += [result | told for result in few_shot]
    page += [few_shot_section(result) for result in few_shot]
    print(f"{run.name}, step {run.step}, tower {run.tower}\n\n{format_results(results)}")
    _write_results(args.json, results)
    if args.page:
        about = f"{told['pretrained']}, tower {run.tower}"
        write_output(args.page, evaluation_page(run.name, about, page).encode(errors="replace"), "--page")


def _write_results(out: Path | None, results: list[dict[str, Any]]) -> None:
    """CLIP_benchmark keeps one object in a file, under this name, and cannot read a list.

    What the evaluation was given in place of the dataset's own stands in the name too, so that one with other labels
    or templates does not take its place.
    """
    from lit_fast.evaluation.evaluate import SETTINGS
    from lit_fast.evaluation.zeroshot_set import OWN_TEMPLATES

    if out is None or not out.is_dir():
        write_json_output(out, results[0] if len(results) == 1 else results)
        return
    said = ("dataset", "pretrained", "model", "language", "task", "train_dataset", *SETTINGS)
    for result in results:
        usual = "template_set" if result.get("template_set") in OWN_TEMPLATES else ""
        parts = (str(result[part]) for part in said if part != usual and result.get(part))
        write_json_output(out / ("_".join(parts).replace("/", "_").replace(" ", "_") + ".json"), result)
