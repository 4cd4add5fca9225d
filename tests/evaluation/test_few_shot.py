"""Few-shot evaluation: the regression against other ways to compute it, the draws, the figures, the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.features import BFLOAT16, Features, Manifest, features_digest, open_features, with_views
from lit_fast.errors import UserError
from lit_fast.evaluation import few_shot
from lit_fast.evaluation.few_shot import (
    RIDGE,
    SEEDS,
    SHOTS,
    check_few_shot,
    classify,
    evaluate_few_shot,
    intervals,
    shuffle_by_class,
    take_shots,
)
from lit_fast.storage.text_files import write_json
from tests.helpers import write_tar

WIDTH = 12


# --- the regression


def by_least_squares(few: np.ndarray, labels: np.ndarray, images: np.ndarray, classes: int) -> np.ndarray:
    """Scores by facts 7.3, the ridge as rows of a least squares problem: another path than any Gram matrix."""
    few, images = few.astype(np.float64), images.astype(np.float64)
    shift = few.sum(axis=0) / len(few)
    scale = np.sqrt(((few - shift) ** 2).sum(axis=0) / len(few)) + 1e-5
    x, z = (
        (np.concatenate([(a - shift) / scale, np.full((len(a), 1), 100.0)], axis=1)) for a in (few, images)
    )
    y = 2 * np.eye(classes)[labels] - 1
    rows = np.concatenate([x, np.sqrt(1024.0) * np.eye(x.shape[1])])
    targets = np.concatenate([y, np.zeros((x.shape[1], classes))])
    return z @ np.linalg.lstsq(rows, targets, rcond=None)[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_classify_equals_least_squares(classes: int, n: int, width: int, seed: int) -> None:
    """More images than features and fewer: both forms of the solution."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width)) * 3
    labels = rng.integers(0, classes, n)
    few = (centres[labels] + rng.normal(size=(n, width))).astype(np.float32)
    few[:, 0] *= 1e3  # features of another size
    images = (rng.normal(size=(50, width)) * 3).astype(np.float32)
    got = classify(few, labels, images, classes)
    scores = by_least_squares(few, labels, images, classes)
    best = scores.max(axis=1)
    # Both are float64; where two classes are equal but for rounding, either may come first. A feature that is
    # constant but for rounding has scores of any size, hence the relative part.
    close = 1e-7 * (1 + np.abs(scores).max(axis=1))
    assert (scores[np.arange(50), got] >= best - close).all()


@pytest.mark.parametrize(("n", "d"), [(5, 30), (30, 30), (300, 30)])
def test_ridge_equals_scikit_learn(n: int, d: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(n)
    x, y = np.pad(rng.normal(size=(n, d - 1)), ((0, 0), (0, 1)), constant_values=100), rng.normal(size=(n, 3))
    want = linear_model.Ridge(alpha=1024.0, fit_intercept=False, solver="svd").fit(x, y).coef_.T
    # Condition number of the Gram matrix: 1e4 n / 1024, times float64's 1e-16.
    np.testing.assert_allclose(few_shot.ridge(x, y), want, rtol=1e-9, atol=1e-13)


def test_classify_does_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    few, images = rng.normal(size=(10, 4)), rng.normal(size=(37, 4))
    labels = np.arange(10) % 3
    whole = classify(few, labels, images, 3)
    monkeypatch.setattr(few_shot, "_TILE", 5)
    assert (classify(few, labels, images, 3) == whole).all()


# --- the draws


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_take_shots_is_nested_and_keeps_small_classes_whole(labels: list[int], seed: int) -> None:
    array = np.array(labels)
    order = shuffle_by_class(array, 5, seed)
    assert [sorted(positions.tolist()) for positions in order] == [
        np.flatnonzero(array == k).tolist() for k in range(5)
    ]
    smaller: set[int] = set()
    for shots in SHOTS:
        taken = take_shots(order, shots)
        assert np.bincount(array[taken], minlength=5).tolist() == [
            min(shots, labels.count(k)) for k in range(5)
        ]
        assert smaller <= set(taken.tolist())
        smaller = set(taken.tolist())


def test_shuffle_by_class_uses_one_generator_for_all_classes() -> None:
    labels = np.repeat(np.arange(4), (30, 5, 1, 20))
    generator = np.random.default_rng(2)
    for number, positions in enumerate(shuffle_by_class(labels, 4, 2)):
        own = np.flatnonzero(labels == number)
        generator.shuffle(own)
        np.testing.assert_array_equal(positions, own)
    assert not np.array_equal(shuffle_by_class(labels, 4, 0)[0], shuffle_by_class(labels, 4, 1)[0])


# --- intervals


def test_intervals_are_over_images_and_seeds() -> None:
    share = np.arange(500) < 150
    same = np.stack([share] * 3, axis=1)[:, None]
    want = binom.ppf((0.025, 0.975), 500, 0.3) / 500
    # 1000 resamples place the quantiles of this distribution, sd 0.02, to within 0.005.
    np.testing.assert_allclose(intervals(same, ["a"])["a"], want, atol=0.01)
    assert intervals(same, ["a"]) == intervals(same, ["a"])
    apart = np.stack([share, share, np.ones(500, bool)], axis=1)[:, None]
    low, high = intervals(np.concatenate([same, apart], axis=1), ["a", "b"])["b"]
    # All three draws are of the last seed once in 27 times, more often than 2.5 %; never of it 8 in 27 times.
    assert low < 0.3
    assert high == 1


# --- datasets


def labelled(
    path: Path,
    labels: list[int],
    values: np.ndarray,
    invalid: tuple[int, ...] = (),
    views: int = 1,
    **options: Any,
) -> Dataset:
    """A dataset with features; the label -1 is none. Further views are nonsense."""
    writer = DatasetWriter(path)
    for i, label in enumerate(labels):
        writer.add(Row(f"{path.name}{i}", 0, 0, 0, (), label))
    dataset = writer.finish(seed=0, sources=[], **({"classnames": ["a", "b", "c"]} | options))
    tower = with_views(TOWER, views)
    write_json(path / "features" / "tiny" / "tower.json", tower)
    features = Features(dataset, "tiny", tower)
    stored = np.pad(values, ((0, 0), (0, (views - 1) * WIDTH)), constant_values=7).astype(BFLOAT16)
    features.array(create=True)[:].write(stored).result()
    manifest = Manifest(
        0, 0, len(labels), dataset.shard_keys[0], tower["identity"], dict.fromkeys(invalid, "x")
    )
    features.write_manifest(replace(manifest, features=features_digest(stored)))
    return dataset


TOWER = {"name": "tiny", "source": "t.npz", "identity": "abc", "width": WIDTH, "gelu": "exact"}
TOWER |= {"dtype": "float32", "preprocess": {"method": "pil-crop", "size": 8, "resize": 8}}


def gaussian(rng: np.random.Generator, labels: list[int]) -> np.ndarray:
    """Three overlapping clouds, far from the origin; rows without a label are nonsense."""
    centres = np.random.default_rng(7).normal(size=(3, WIDTH)) * 0.7 + 5
    values = centres[labels] + rng.normal(size=(len(labels), WIDTH))
    values[np.array(labels) < 0] = 1e6
    return values


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Dataset, Dataset]:
    """One class has fewer than 25 images, some rows have no label, some no feature."""
    rng = np.random.default_rng(0)
    train = [0] * 40 + [-1] * 3 + [1] * 30 + [2] * 8
    test = [0, 1, 2, -1] * 30
    values, tested = gaussian(rng, train), gaussian(rng, test)
    values[[0, 50]] = tested[[1]] = 0
    return (
        labelled(tmp_path / "train", train, values, invalid=(0, 50)),
        labelled(tmp_path / "test", test, tested, invalid=(1,)),
    )


def caches(dataset: Dataset) -> list[Path]:
    return sorted(Path(dataset.path).glob("features/*/few_shot/*"))


def test_few_shot_equals_the_procedure_step_by_step(pair: tuple[Dataset, Dataset]) -> None:
    got = evaluate_few_shot(*pair, TOWER)
    data = []
    for dataset, invalid in zip(pair, ((0, 50), (1,)), strict=True):
        features = np.asarray(open_features(dataset).array()[:].read().result()).astype(np.float64)
        own = np.concatenate([block.labels for block in dataset.iter_blocks()])
        kept = [i for i in range(dataset.rows) if own[i] >= 0 and i not in invalid]
        data.append((features[kept], own[kept]))
    (x, y), (z, want) = data
    for shots in SHOTS:
        by_seed = []
        for seed in SEEDS:
            generator = np.random.default_rng(seed)
            few = [i for k in range(3) for i in generator.permutation(np.flatnonzero(y == k))[:shots]]
            scores = by_least_squares(x[few], y[few], z, 3)
            by_seed.append((scores.argmax(axis=1) == want).mean())
        name = f"acc1_{shots}shot"
        assert got["seeds"][name] == pytest.approx(by_seed, abs=1e-12)
        assert got["metrics"][name] == pytest.approx(np.mean(by_seed), abs=1e-12)
        low, high = got["interval_95"][name]
        assert low < got["metrics"][name] < high
        assert got["chance"][name] == 1 / 3
    assert got["metrics"]["acc1_25shot"] > got["metrics"]["acc1_1shot"] > 1 / 3
    keys = ("dataset", "train_dataset", "task", "rows", "images", "classes", "train_images")
    assert [got[key] for key in keys] == ["test", "train", "few_shot_classification", 120, 89, 3, 76]


def test_few_shot_is_computed_once_per_tower(
    pair: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = evaluate_few_shot(*pair, TOWER)
    (file,) = caches(pair[1])
    assert json.loads(file.read_text())["result"]["metrics"] == want["metrics"]

    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(few_shot, "_evaluate", never)
    assert evaluate_few_shot(*pair, TOWER) == want


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"digest": "x"}', "cut", "changed", "folder"])
def test_few_shot_with_damaged_cache_computes_again(pair: tuple[Dataset, Dataset], damage: str) -> None:
    want = evaluate_few_shot(*pair, TOWER)
    (file,) = caches(pair[1])
    whole = file.read_text()
    if damage == "folder":
        file.unlink()
        file.mkdir()
        assert evaluate_few_shot(*pair, TOWER) == want
        return
    changed = whole.replace('"images": 89', '"images": 98')
    assert changed != whole
    file.write_text({"cut": whole[: len(whole) // 2], "changed": changed}.get(damage, damage))
    assert evaluate_few_shot(*pair, TOWER) == want
    assert file.read_text() == whole
    assert caches(pair[1]) == [file]


def test_few_shot_cache_depends_on_rows_labels_features_and_procedure(
    pair: tuple[Dataset, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = pair
    evaluate_few_shot(train, test, TOWER)
    rng = np.random.default_rng(1)
    labels = [0, 1, 2] * 10
    values = gaussian(rng, labels)
    for other in (labels, [1, *labels[1:]]):  # the same keys with another label
        name = tmp_path / f"x{len(caches(test))}" / "more"
        evaluate_few_shot(labelled(name, other, values), test, TOWER)
    evaluate_few_shot(labelled(tmp_path / "y" / "more", labels, values + 1), test, TOWER)
    evaluate_few_shot(labelled(tmp_path / "z" / "more", labels, values, invalid=(3,)), test, TOWER)
    assert len(caches(test)) == 5
    monkeypatch.setattr(few_shot, "_PROCEDURE", 2)
    evaluate_few_shot(train, test, TOWER)
    assert len(caches(test)) == 6


def test_few_shot_of_read_only_dataset_is_evaluated(pair: tuple[Dataset, Dataset]) -> None:
    (Path(pair[1].path) / "features" / "tiny" / "few_shot").write_bytes(b"in the way")
    assert evaluate_few_shot(*pair, TOWER)["images"] == 89


def test_few_shot_without_class_names_uses_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = [0, 1, 2] * 9
    sets = [
        labelled(tmp_path / name, labels, gaussian(rng, labels), classnames=[]) for name in ("one", "two")
    ]
    assert evaluate_few_shot(sets[0], sets[1], TOWER)["classes"] == 3


def test_few_shot_of_several_views_uses_the_first(tmp_path: Path) -> None:
    labels = [0, 1, 2] * 9
    found = []
    for views in (1, 3):
        rng = np.random.default_rng(0)
        names = (tmp_path / f"{views}" / name for name in ("train", "test"))
        sets = [labelled(path, labels, gaussian(rng, labels), views=views) for path in names]
        found.append(evaluate_few_shot(sets[0], sets[1], TOWER))
    assert found[0] == found[1]


# --- mistakes


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (([-1, -1], {}), ([0, 1], {}), r"/train has no labels for few-shot"),
        (([0, 1], {}), ([-1, -1], {}), r"/test has no labels for few-shot"),
        (([0, 0], {"classnames": ["a"]}), ([0, 0], {"classnames": ["a"]}), "has one class"),
        (([0, 1], {}), ([0, 1], {"classnames": ["a", "b"]}), "different classes .3 and 2 names"),
        (
            ([0, 1], {}),
            ([0, 1], {"classnames": ["a", "c", "b"]}),
            "different classes .number 1 is 'b' and 'c'",
        ),
        (([1, 1], {}), ([0, 1], {}), "/train has images of one class"),
        (([0, 3], {}), ([0, 1], {}), "/train has label 3 but only 3 class names"),
        (([0, 1], {}), ([0, 9], {}), "/test has label 9 but only 3 class names"),
        (
            ([0, 1], {}),
            ([0, -1], {"invalid": (0,)}),
            "/test has no image with both a label and a valid feature",
        ),
    ],
)
def test_few_shot_mistakes_are_named(tmp_path: Path, train: Any, test: Any, message: str) -> None:
    zeros = np.zeros((2, WIDTH))
    sets = [labelled(tmp_path / n, v[0], zeros, **v[1]) for n, v in (("train", train), ("test", test))]
    with pytest.raises(UserError, match=message) as caught:
        evaluate_few_shot(sets[0], sets[1], TOWER)
    assert "\n" not in str(caught.value)
    assert not caches(sets[1])


def test_few_shot_with_equal_rows_or_another_tower_raises_user_error(pair: tuple[Dataset, Dataset]) -> None:
    with pytest.raises(UserError, match=r"/train and .*/train have the same rows"):
        check_few_shot(pair[0], pair[0])
    with pytest.raises(UserError, match="/train has no features of the run's tower"):
        evaluate_few_shot(*pair, TOWER | {"identity": "other"})


def test_few_shot_of_nan_features_raises_user_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = [0, 1, 2] * 3
    values = gaussian(rng, labels)
    train = labelled(tmp_path / "train", labels, values)
    values[4, 2] = np.nan
    with pytest.raises(UserError, match="/test are not finite"):
        evaluate_few_shot(train, labelled(tmp_path / "test", labels, values), TOWER)


# --- real flowers


def test_few_shot_of_real_flowers_reaches_the_known_accuracy(realdata: Path, tmp_path: Path) -> None:
    """200 photos, a hundred to learn from: the known linear probe of these features reaches 92.8 %."""
    import tarfile

    source = realdata / "wds_tf_flowers"
    with tarfile.open(source / "test" / "0.tar") as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    keys = sorted({name.partition(".")[0] for name, _ in members})
    for name, chosen in (("train", set(keys[:200:2])), ("test", set(keys[1:200:2]))):
        part = [(n, data) for n, data in members if n.partition(".")[0] in chosen]
        write_tar(tmp_path / f"{name}-tars" / "0.tar", part)
        (tmp_path / f"{name}-tars" / "classnames.txt").write_text((source / "classnames.txt").read_text())
        assert main(["index", str(tmp_path / f"{name}-tars" / "0.tar"), "--out", str(tmp_path / name)]) == 0
        weights = realdata / "vit" / "Ti_16-augreg-i21k-i1k-224.npz"
        command = ["embed", str(tmp_path / name), "--tower", str(weights), "--preprocess", "tf-squash"]
        assert main([*command, "--batch-size", "16"]) == 0
    train, test = open_dataset(tmp_path / "train"), open_dataset(tmp_path / "test")
    got = evaluate_few_shot(train, test, open_features(test).provenance)
    low, high = got["interval_95"]["acc1_25shot"]
    assert low < 0.928 < high + 0.05
    assert got["metrics"]["acc1_25shot"] > 0.8
    assert got["metrics"]["acc1_5shot"] > 0.7
    assert RIDGE == 1024
