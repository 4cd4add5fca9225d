"""The commands as functions of a Python program or a notebook.

    from lit_fast import api
    api.index("pairs/*.tar", out="data/pairs")
    api.embed("data/pairs", tower="augreg/B_8", batch_size=64)
    api.tokenize("data/pairs", train_vocab=32000)
    api.train("siglit_b8_one_day", workdir="runs/b8", dataset="data/pairs", config={"steps": 1000})
    results = api.evaluate("runs/b8", retrieval=["data/coco"])
    model = api.load("runs/b8")

A keyword is an option of the command, `--batch-size 64`: True is an option without a value, a list gives several
values, None and False are left out. Work that was interrupted continues when the same function is called again.
All functions raise `lit_fast.errors.UserError` for a mistake in arguments or inputs; its message is the line that
the command prints. Progress is printed to stderr.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lit_fast import load
from lit_fast.cli.main import run_command
from lit_fast.storage.paths import StrPath

__all__ = ["embed", "evaluate", "index", "load", "tokenize", "train"]

Option = StrPath | bool | int | float | Sequence[StrPath] | None


def index(*sources: StrPath, out: StrPath, **options: Option) -> None:
    """Create a dataset from images and captions, see `lit-fast index --help`.

    Args:
      sources: files, directories, patterns or URLs.
      out: the new dataset.
      options: the other options, such as `captions="en=caption_en"`.
    """
    _run("index", sources, {"out": out, **options})


def embed(dataset: StrPath, *, tower: str, **options: Option) -> None:
    """Embed every image of a dataset with a frozen vision tower, see `lit-fast embed --help`.

    Args:
      dataset: from `index`.
      tower: a name or a path.
      options: the other options, such as `preprocess="tf-squash"`.
    """
    _run("embed", [dataset], {"tower": tower, **options})


def tokenize(dataset: StrPath, **options: Option) -> None:
    """Convert the captions of a dataset to token ids, see `lit-fast tokenize --help`.

    Args:
      dataset: from `index`.
      options: `train_vocab=N` or `tokenizer=FILE`, and the other options.
    """
    _run("tokenize", [dataset], options)


def train(
    recipe: StrPath,
    *,
    workdir: StrPath,
    dataset: StrPath,
    config: Mapping[str, Any] | None = None,
    **options: Option,
) -> None:
    """Train a text tower, or continue an interrupted training, see `lit-fast train --help`.

    Args:
      recipe: a TOML file, or the name of one of the package.
      workdir: the run.
      dataset: with features and tokens.
      config: keys of the configuration by their names, such as `{"optimizer.learning_rate": 3e-4}`.
      options: the other options.
    """
    keys = {key: _value(value) for key, value in (config or {}).items()}
    _run("train", [recipe], {"workdir": workdir, "dataset": dataset, **keys, **options})


def evaluate(run: StrPath, **options: Option) -> list[dict[str, Any]]:
    """Evaluate a run and return a dictionary per dataset and task, see `lit-fast eval --help`.

    Args:
      run: from `train`.
      options: `zero_shot`, `retrieval` and `few_shot` are lists of datasets.

    Returns:
      The content of the command's `--json`: task, metrics (shares from 0 to 1), chance levels, 95 % intervals.
    """
    results: list[dict[str, Any]] = _run("eval", [run], options)
    return results


def _run(command: str, positional: Sequence[StrPath], options: Mapping[str, Any]) -> Any:
    words = [os.fspath(word) for word in positional]
    for name, value in options.items():
        flag = f"--{name}" if "." in name else f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            words += [flag, *(os.fspath(word) for word in value)] if value else []
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    return run_command([command, *words])


def _value(value: Any) -> Any:
    """Return a value of the configuration as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(str(entry) for entry in value)
    return value
