"""Evaluation of datasets and the command `eval`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.errors import UserError
from lit_fast.evaluation.evaluate import distinct_names, retrieval_evaluation, zero_shot_evaluation
from lit_fast.evaluation.table import format_results, without_languages
from lit_fast.storage.text_files import write_json
from tests.evaluation.sets import (
    WIDTH,
    add_features,
    coloured,
    embed_colours,
    make_dataset,
    multilingual,
    provenance,
)

# --- zero-shot


def test_zero_shot_counts_labelled_valid_rows(tmp_path: Path) -> None:
    data = make_dataset(
        tmp_path / "colours",
        [2, -1, 0, 1, 1, 0],
        [()] * 6,
        classnames=["RED!, crimson", "green", "blue"],
        templates=["a {c}.", "{c}"],
    )
    rows = np.array([0, 1, 2, 4, 5])  # row 3 has no embedding
    images = np.eye(3, dtype=np.float32)[[2, 0, 0, 1, 1]]  # the last is wrong: label 0, looks green
    [got] = zero_shot_evaluation(data, lambda: {3})(rows, images, embed_colours)
    assert got["metrics"] == {"acc1": 0.75, "mean_per_class_recall": pytest.approx(2.5 / 3)}
    assert got["chance"] == {"acc1": 1 / 3, "mean_per_class_recall": 1 / 3}
    low, high = got.pop("interval_95")["acc1"]
    assert low < 0.75 < high <= 1
    del got["metrics"], got["chance"]
    assert got == {
        "dataset": "colours", "model": "", "pretrained": "", "task": "zeroshot_classification",
        "language": "en", "rows": 6, "images": 4, "classes": 3, "templates": 2,
        "template_set": "dataset",
    }  # fmt: skip


def test_zero_shot_without_templates_uses_bare_names(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d", [0, 1], [(), ()], classnames=["Red", "Green"])
    seen: list[str] = []

    def embed(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return embed_colours(texts)

    [got] = zero_shot_evaluation(data)(np.arange(2), np.eye(3, dtype=np.float32)[:2], embed)
    assert seen == ["red", "green"]
    assert (got["templates"], got["template_set"]) == (1, "class_name_only")
    assert got["metrics"]["acc1"] == 1


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([-1, -1], {}, "no labels and no class names for zero-shot"),
        ([0, 1], {}, "no class names for zero-shot"),
        ([-1, -1], {"classnames": ["a", "b"]}, "no labels for zero-shot"),
        ([0, 1], {"classnames": ["a", "?"]}, r"class name '\?' \(number 1\)"),
        ([0, 1], {"classnames": ["a", "b"], "templates": ["photo"]}, "prompt template 'photo'"),
    ],
)
def test_zero_shot_with_missing_parts_names_them(
    tmp_path: Path, labels: list[int], options: dict[str, Any], message: str
) -> None:
    data = make_dataset(tmp_path / "set", labels, [(), ()], **options)
    with pytest.raises(UserError, match=rf"dataset \S*/set\b.*{message}"):
        zero_shot_evaluation(data)


def test_zero_shot_with_unusable_labels_raises_user_error(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d", [-1, 7], [(), ()], classnames=["red", "green"])
    with pytest.raises(UserError, match="label 7 but only 2 class names"):
        zero_shot_evaluation(data)
    data = make_dataset(tmp_path / "e", [-1, 1], [(), ()], classnames=["red", "green"])
    with pytest.raises(UserError, match="no image with both a label and a valid feature"):
        zero_shot_evaluation(data, lambda: {1})


# --- retrieval


def test_retrieval_counts_captioned_valid_rows(tmp_path: Path) -> None:
    captions = [("red", "red red"), (), ("blue",), ("green", "not blue")]
    data = make_dataset(tmp_path / "d", [-1] * 4, captions)
    images = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]
    evaluate = retrieval_evaluation(data)
    [got] = evaluate(np.arange(4), images, embed_colours)
    assert got["language"] == "en"
    assert (got["rows"], got["images"], got["texts"]) == (4, 3, 5)
    assert got["metrics"]["image_retrieval_recall@1"] == 0.8  # "not blue" finds the blue image
    assert got["metrics"]["text_retrieval_recall@1"] == 1.0
    assert got["chance"]["image_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert got["chance"]["text_retrieval_recall@1"] == pytest.approx((2 + 1 + 2) / 5 / 3)
    # Without row 2 its caption is gone too.
    [fewer] = evaluate(np.array([0, 3]), images[[0, 3]], embed_colours)
    assert (fewer["images"], fewer["texts"]) == (2, 4)


def test_retrieval_without_captions_raises_user_error(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "set", [0], [()], classnames=["a"])
    with pytest.raises(UserError, match=r"/set has no captions"):
        retrieval_evaluation(data)
    data = make_dataset(tmp_path / "other", [0, 1], [(), ("red",)])
    with pytest.raises(UserError, match="no image with both a caption and a valid feature"):
        retrieval_evaluation(data, lambda: {1})


def test_retrieval_of_languages_has_each_and_the_average(tmp_path: Path) -> None:
    data = multilingual(tmp_path / "xm")
    images = np.eye(3, dtype=np.float32)
    german, english, _, average = results = retrieval_evaluation(data)(np.arange(3), images, embed_colours)
    assert [r["language"] for r in results] == ["de", "en", "und", "average"]
    assert [(r["images"], r["texts"]) for r in results] == [(2, 3), (3, 4), (1, 1), (3, 8)]
    assert average["languages"] == ["de", "en", "und"]
    # Candidates are those of the language: "blue" of the first image finds the third, "red" of the second the first.
    assert german["metrics"]["image_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert english["metrics"]["image_retrieval_recall@1"] == pytest.approx(3 / 4)
    # The two say "blue" alike, and the first one is not the third image's.
    assert german["metrics"]["text_retrieval_recall@1"] == 1 / 2
    assert german["metrics"]["text_retrieval_recall@5"] == 1.0
    assert german["chance"]["image_retrieval_recall@1"] == 1 / 2
    for name, value in average["metrics"].items():
        assert value == pytest.approx(np.mean([r["metrics"][name] for r in results[:3]]))
        low, high = average["interval_95"][name]
        assert low <= value <= high
    # A dataset of one language has the figures of that language.
    writer = DatasetWriter(tmp_path / "en")
    for i, captions in enumerate((("red",), ("green", "red"), ("blue",))):
        writer.add(Row(f"k{i}", 0, 0, 0, captions, -1, ("en",) * len(captions)))
    [alone] = retrieval_evaluation(writer.finish(seed=0, sources=[]))(np.arange(3), images, embed_colours)
    assert alone["language"] == "en"
    assert alone["metrics"] == english["metrics"]
    assert without_languages([*results, alone]) == [average, alone]
    lines = format_results([*results, alone]).splitlines()
    assert lines[1].startswith("xm de ")
    assert lines[19].startswith("xm average ")
    assert lines[-1].startswith("en retrieval: images 3, texts 4")


@pytest.mark.parametrize("where", ["image", "text"])
def test_evaluation_of_nan_raises_user_error(tmp_path: Path, where: str) -> None:
    data = make_dataset(tmp_path / "d", [0, 1], [("red",), ("green",)], classnames=["red", "green"])
    images = np.eye(3, dtype=np.float32)[:2]
    images[0, 0] = np.nan if where == "image" else 1

    def embed(texts: list[str]) -> np.ndarray:
        return embed_colours(texts) * np.float32(np.nan if where == "text" else 1)

    for evaluation in (zero_shot_evaluation, retrieval_evaluation):
        with pytest.raises(UserError, match=rf"{where} embeddings of \S+ are not finite"):
            evaluation(data)(np.arange(2), images, embed)


# --- names and table


def test_distinct_names_add_the_parent_to_equal_names(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "val", tmp_path / "b" / "val", tmp_path / "c", tmp_path / "a" / "val"]
    assert distinct_names(paths) == ["a/val", "b/val", "c", "a/val"]


def test_format_results_aligns_figures_and_counts() -> None:
    result = {
        "dataset": "flowers", "language": "en",
        "task": "zeroshot_classification", "rows": 400, "images": 398, "classes": 5,
        "templates": 3, "template_set": "t.txt", "labels": "real",
        "metrics": {"acc1": 0.389, "acc5": 1.0}, "chance": {"acc1": 0.2, "acc5": 1.0},
        "interval_95": {"acc1": [0.3421, 0.4363], "acc5": [1.0, 1.0]},
    }  # fmt: skip
    other = {
        "dataset": "dev", "language": "en", "task": "zeroshot_retrieval", "rows": 1000, "images": 1000, "texts": 5000,
        "metrics": {"image_retrieval_recall@1": 0.17}, "chance": {"image_retrieval_recall@1": 0.001},
        "interval_95": {"image_retrieval_recall@1": [0.159, 0.181]},
    }  # fmt: skip
    want = """\
dataset  task       metric                        %  95 % interval  chance
flowers  zero-shot  acc1                       38.9   34.2 -  43.6    20.0
flowers  zero-shot  acc5                      100.0  100.0 - 100.0   100.0
dev      retrieval  image_retrieval_recall@1   17.0   15.9 -  18.1     0.1

flowers zero-shot: images 398, classes 5, templates 3, template set t.txt, labels real; \
2 rows without label or valid image were skipped
dev retrieval: images 1,000, texts 5,000"""
    assert format_results([result, other]) == want


# --- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an untrained tower of one layer, with its checkpoints 3 and 7."""
    import jax

    from lit_fast.config import Config, TextConfig
    from lit_fast.config_io import to_toml
    from lit_fast.models.two_towers import init_params, text_tower
    from lit_fast.runs.checkpoint import open_manager, save
    from tests.trained import words

    path = tmp_path_factory.mktemp("runs") / "tiny-run"
    path.mkdir()
    tokenizer = words()
    config = Config(text=TextConfig(width=32, depth=1, heads=2, dtype="float32"))
    (path / "config.toml").write_text(to_toml(config))
    (path / "tokenizer.model").write_bytes(tokenizer.model)
    write_json(path / "tokens.json", {"max_length": 8, "pad_id": 1, "identity": tokenizer.identity})
    write_json(path / "tower.json", provenance("abc"))
    module = text_tower(config.text, tokenizer, WIDTH)
    params = jax.tree.map(np.asarray, init_params(module, config, np.zeros(WIDTH)))
    manager = open_manager(path)
    for step in (3, 7):
        save(manager, step, {"params": params, "rest": {"opt": np.zeros(1)}}, {})
    manager.wait_until_finished()
    manager.close()
    return path


def test_eval_prints_a_table_and_writes_json(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_features(coloured(tmp_path / "set"))
    d, out = str(tmp_path / "set"), tmp_path / "new" / "results.json"
    assert main(["eval", str(run), "--zero-shot", d, "--retrieval", d, "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [r["task"] for r in results] == ["zeroshot_classification", "zeroshot_retrieval"]
    for result in results:
        assert (result["model"], result["pretrained"]) == ("tiny-run", "step 7")
        assert (result["rows"], result["images"]) == (6, 5)
        assert result["metrics"].keys() == result["chance"].keys() == result["interval_95"].keys()
    assert results[1]["metrics"]["image_retrieval_recall@5"] == 1  # five candidates
    stdout = capsys.readouterr().out
    assert stdout.startswith("tiny-run, step 7, tower tiny\n")
    assert stdout.endswith(format_results(results) + "\n")

    assert main(["eval", str(run), "--zero-shot", d, "--step", "3", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["pretrained"] == "step 3"
    assert main(["eval", str(run), "--zero-shot", d, "--step", "4"]) == 2
    assert "no checkpoint of step 4; choose from 3, 7" in capsys.readouterr().err


def test_eval_into_directory_writes_a_file_per_result(run: Path, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        add_features(coloured(tmp_path / parent / "set"))
    sets = [str(tmp_path / parent / "set") for parent in ("a", "b")]
    out = tmp_path / "results"
    out.mkdir()
    assert main(["eval", str(run), "--zero-shot", *sets, "--retrieval", sets[0], "--json", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "a_set_step_7_tiny-run_en_zeroshot_classification.json",
        "a_set_step_7_tiny-run_en_zeroshot_retrieval.json",
        "b_set_step_7_tiny-run_en_zeroshot_classification.json",
    ]
    assert {json.loads(path.read_text())["dataset"] for path in out.iterdir()} == {"a/set", "b/set"}

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    templates, labels = tmp_path / "t.txt", tmp_path / "other.json"
    templates.write_text("{}\n")
    labels.write_text(json.dumps({f"k{i}": [i % 3, 0] for i in range(6)}))
    given = ["--templates", templates, "--labels", labels, "--classes", "present", "--json", out]
    assert main(["eval", *map(str, [run, "--zero-shot", *sets, *given])]) == 0
    assert {path.name for path in out.iterdir()} - before.keys() == {
        f"{parent}_set_step_7_tiny-run_en_zeroshot_classification_t.txt_other_present.json" for parent in "ab"
    }
    assert all((out / name).read_bytes() == data for name, data in before.items())


def test_eval_with_files_replaces_names_templates_and_labels(run: Path, tmp_path: Path) -> None:
    add_features(coloured(tmp_path / "set"))
    names, templates, labels = tmp_path / "n.txt", tmp_path / "t.txt", tmp_path / "l.json"
    names.write_text("thing\nred\nblue\n")
    templates.write_text("{}\na {c} thing\nnot a {c}\n")
    labels.write_text(json.dumps({f"k{i}": [0, 1, 2][i % 3 :] for i in range(6)}))
    out = tmp_path / "out.json"
    arguments = ["--classnames", names, "--templates", templates, "--labels", labels, "--classes", "present"]
    assert main(["eval", *map(str, [run, "--zero-shot", tmp_path / "set", *arguments, "--json", out])]) == 0
    result = json.loads(out.read_text())
    assert (result["templates"], result["template_set"], result["classes"]) == (3, "t.txt", 3)
    assert result["metrics"].keys() == {"acc1"}  # no class of its own, no recall per class
    # Rows 0 to 5 but for the invalid row 1 have 3, 1, 3, 2 and 1 of three classes.
    assert result["chance"]["acc1"] == pytest.approx((3 + 1 + 3 + 2 + 1) / 5 / 3)


def test_eval_mistakes_are_found_before_loading_weights(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("lit_fast.runs.run.open_run", never)
    good, other, bare = (coloured(tmp_path / name) for name in ("good", "other", "bare"))
    add_features(good)
    add_features(other, identity="def")
    uncaptioned = make_dataset(tmp_path / "uncaptioned", [0], [()], classnames=["a"])
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        ([], "nothing to evaluate; give datasets with --zero-shot E or --retrieval E"),
        (["--zero-shot", good.path, tmp_path / "no"], "/no does not exist"),
        (["--zero-shot", good.path, "--retrieval", uncaptioned.path], "/uncaptioned has no captions"),
        (["--zero-shot", good.path, bare.path], "/bare has no features of the run's tower tiny"),
        (["--retrieval", good.path, other.path], "/other has no features of the run's tower tiny"),
        (["--retrieval", good.path, "--labels", "real"], "--labels and --classes need --zero-shot E"),
        (["--zero-shot", good.path, "--labels", "unreal"], "one of the known labels: real"),
        (["--zero-shot", good.path, "--classnames", file], "/file is empty"),
        (["--zero-shot", good.path, "--templates", tmp_path], "is a directory; give a file with one name"),
        (["--retrieval", good.path, "--json", file / "out.json"], "is not a writable directory"),
    ):
        assert main(["eval", str(run), *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert main(["eval", str(tmp_path / "no-run"), "--zero-shot", str(good.path)]) == 2
    assert "no-run does not exist" in capsys.readouterr().err
