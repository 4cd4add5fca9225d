"""Evaluation during training: names of the metrics, and sets that are refused."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lit_fast.config import Config, EvalConfig
from lit_fast.errors import UserError
from lit_fast.train.evaluator import Evaluator
from tests.evaluation.sets import (
    COLOURS,
    WIDTH,
    add_features,
    coloured,
    make_dataset,
    multilingual,
    provenance,
)

RECALLS = {f"{task}_retrieval_recall@{k}" for task in ("image", "text") for k in (1, 5, 10)}


def embed_text(params: dict[str, float], texts: Sequence[str]) -> np.ndarray:
    """Return random embeddings that depend on the parameters."""
    x = np.random.default_rng(int(params["seed"])).normal(size=(len(texts), WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def evaluation(zero_shot: list[Path], retrieval: list[Path]) -> Evaluator:
    config = EvalConfig(zero_shot=tuple(map(str, zero_shot)), retrieval=tuple(map(str, retrieval)))
    return Evaluator(Config(evaluate=config), provenance("abc"))


def test_evaluator_names_sets_languages_and_averages(tmp_path: Path) -> None:
    for data in (coloured(tmp_path / "a" / "val"), coloured(tmp_path / "b" / "val")):
        add_features(data)
    add_features(multilingual(tmp_path / "xm"))
    sets = [tmp_path / "a" / "val", tmp_path / "b" / "val"]
    evaluator = evaluation(sets[:1], [sets[1], tmp_path / "xm"])
    evaluator.load_images(np.zeros(WIDTH, np.float32))
    results = evaluator.run(embed_text, {"seed": 0.0}, {"seed": 1.0})
    # Two sets, two languages (the row with captions of an unknown one is invalid) and their average; all of it
    # for the weights and for their average.
    assert len(results) == 2 * (1 + 1 + 3)
    named = {"a/val/acc1", "a/val/mean_per_class_recall"}
    named |= {f"{name}/{recall}" for name in ("b/val", "xm") for recall in RECALLS}
    averaged = {f"{name.rpartition('/')[0]} (average)/{name.rpartition('/')[2]}" for name in named}
    metrics = evaluator.metrics()
    assert metrics.keys() == named | averaged
    [average] = [r for r in results if r["dataset"] == "xm" and r["language"] == "average"]
    assert metrics["xm/text_retrieval_recall@1"] == average["metrics"]["text_retrieval_recall@1"]
    assert "xm de" not in evaluator.table()
    assert "xm average " in evaluator.table()


def test_evaluator_refuses_sets_that_cannot_be_evaluated(tmp_path: Path) -> None:
    far = make_dataset(tmp_path / "far", [0, 7], [("red",), ("blue",)], classnames=COLOURS)
    lone = make_dataset(tmp_path / "lone", [-1, 2], [(), ("blue",)], classnames=COLOURS)
    for data in (far, lone):
        add_features(data)
    with pytest.raises(UserError, match="label 7 but only 3 class names"):
        evaluation([far.path], [])
    for sets, missing in ((([lone.path], []), "a label"), (([], [lone.path]), "a caption")):
        with pytest.raises(UserError, match=f"no image with both {missing} and a valid feature"):
            evaluation(*sets)
    bare = make_dataset(tmp_path / "bare", [0, 1], [(), ()])
    with pytest.raises(UserError, match="has no class names for zero-shot"):
        evaluation([bare.path], [])
    with pytest.raises(UserError, match="has no captions for retrieval"):
        evaluation([], [bare.path])
