"""The page of an evaluation: its figures and confusions are right, its pictures the rows', its texts only texts."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.evaluation.evaluate import retrieval_evaluation, zero_shot_evaluation
from lit_fast.report import evaluation_page as page_module
from lit_fast.report.evaluation_page import (
    MAX_PICTURES,
    evaluation_page,
    few_shot_section,
    memoized,
    retrieval_section,
    zero_shot_section,
)
from lit_fast.report.gallery import MAX_BYTES
from tests.helpers import encoded, write_tar

COLOURS = {"red": (220, 20, 20), "green": (20, 160, 20), "blue": (20, 20, 220)}
NAMES = list(COLOURS)


class Page(HTMLParser):
    """A page as a browser takes it: tables as cells, figures as (text, kind, JPEG or None), list items."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.sections: list[dict[str, Any]] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.feed(text)
        assert not self.open

    @property
    def section(self) -> dict[str, Any]:
        return self.sections[-1]

    def within(self, tag: str) -> bool:
        return any(name == tag for name, _ in self.open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag == "section":
            self.sections.append({"title": "", "cells": [], "figures": [], "items": []})
        elif tag == "tr" and self.sections:
            self.section["cells"].append([])
        elif tag in ("td", "th"):
            self.section["cells"][-1].append("")
        elif tag == "figure":
            self.section["figures"].append(["", given["class"], None])
        elif tag == "li":
            self.section["items"].append(["", given.get("class", "")])
        elif tag == "img":
            self.sources.append(given["src"])
            self.section["figures"][-1][2] = given["src"]
        if tag not in ("meta", "img", "wbr"):
            self.open.append((tag, given.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.within("h2"):
            self.section["title"] += data
        elif self.within("td") or self.within("th"):
            self.section["cells"][-1][-1] += data
        elif self.within("figcaption"):
            self.section["figures"][-1][0] += data
        elif self.within("li") and not self.within("figure"):
            self.section["items"][-1][0] += data.strip("\n")

    def titled(self, end: str) -> dict[str, Any]:
        (found,) = [s for s in self.sections if s["title"].endswith(end)]
        return found


def colour_of(source: str) -> str:
    """Which of the colours a thumbnail has."""
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
    mean = np.asarray(image, np.float64).mean(axis=(0, 1))
    return min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())


def embed_colours(texts: list[str]) -> np.ndarray:
    """A text points along the axes of the colours in it; without any, along all."""
    counts = np.array([[1e-3 + t.lower().count(c) for c in COLOURS] for t in texts], np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def coloured(path: Path, count: int = 30, prefix: str = "") -> Dataset:
    """Pictures of one colour, class and caption; row i is not picture i."""
    members = []
    for i in range(count):
        name = NAMES[i % 3]
        texts = [f"a {name} <u>thing</u> no {i}", f"{name} & more"]
        members += [
            (f"{prefix}{i:04d}.jpg", encoded(Image.new("RGB", (40, 20), COLOURS[name]))),
            (f"{prefix}{i:04d}.cls", str(i % 3).encode()),
            (f"{prefix}{i:04d}.json", json.dumps({"caption": texts[0], "captions": texts}).encode()),
        ]
    write_tar(path / "tars" / "0.tar", members)
    (path / "tars" / "classnames.txt").write_text("\n".join(NAMES))
    assert main(["index", str(path / "tars" / "0.tar"), "--out", str(path / "set")]) == 0
    return open_dataset(path / "set")


def labels_of(dataset: Dataset) -> np.ndarray:
    return np.concatenate([np.array(block.labels) for block in dataset.iter_blocks()])


def looks(dataset: Dataset, wrong: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Rows and embeddings of their colours; of the rows in `wrong`, of the next colour."""
    labels = labels_of(dataset)
    labels[list(wrong)] += 1
    return np.arange(dataset.rows), np.eye(3, dtype=np.float32)[labels % 3]


def zero_shot(dataset: Dataset, rows: np.ndarray, images: np.ndarray, pictures: int = MAX_PICTURES) -> str:
    results = zero_shot_evaluation(dataset)(rows, images, embed_colours)
    return evaluation_page(
        "r", "a", [zero_shot_section(results, dataset, rows, images, embed_colours, pictures)]
    )


def retrieval(dataset: Dataset, rows: np.ndarray, images: np.ndarray, pictures: int = MAX_PICTURES) -> str:
    results = retrieval_evaluation(dataset)(rows, images, embed_colours)
    return evaluation_page(
        "r", "a", [retrieval_section(results, dataset, rows, images, embed_colours, pictures)]
    )


def test_zero_shot_section_shows_figures_recalls_confusions_and_examples(tmp_path: Path) -> None:
    dataset = coloured(tmp_path)
    labels = labels_of(dataset)
    wrong = tuple(np.flatnonzero(labels == 1)[:4].tolist()) + tuple(np.flatnonzero(labels == 2)[:1].tolist())
    rows, images = looks(dataset, wrong)
    keep = np.delete(rows, 2)  # a row without an embedding shifts nothing
    page = Page(zero_shot(dataset, keep, images[keep]))
    lost = {name: int(labels[2] == k) for k, name in enumerate(NAMES)}
    missed = {name: sum(labels[r] == k and r != 2 for r in wrong) for k, name in enumerate(NAMES)}
    right = {name: 10 - lost[name] - missed[name] for name in NAMES}

    figures = page.titled("zero-shot classification")["cells"]
    assert figures[1][:2] == ["first guess right", f"{100 * sum(right.values()) / 29:.1f} %"]
    assert figures[1][3] == "33.3 %"
    recalls = page.titled("recall of the classes")["cells"][1:]
    assert {name: (seen, share) for name, seen, share, _ in recalls} == {
        name: (str(10 - lost[name]), f"{100 * right[name] / (10 - lost[name]):.1f} %") for name in NAMES
    }
    shares = [float(row[2].removesuffix(" %")) for row in recalls]
    assert shares == sorted(shares)
    matrix = page.titled("confusions")["cells"]
    for k, name in enumerate(NAMES):
        want = dict.fromkeys(range(3), "")
        want[k] = str(right[name])
        want[(k + 1) % 3] = str(missed[name]) if missed[name] else ""
        assert matrix[1 + k] == [f"{k + 1} {name}", *want.values()]

    for caption, kind, source in page.titled("named right")["figures"]:
        assert kind == "right"
        assert caption.split()[0] == colour_of(source)
    shown = page.titled("named wrong")["figures"]
    assert len(shown) == len(wrong) - (2 in wrong)
    for caption, kind, source in shown:
        own, called = re.findall(r"^(?:called )?(\w+) -?[\d.]+$", caption, re.MULTILINE)
        assert (kind, own) == ("wrong", colour_of(source))
        assert called == NAMES[(NAMES.index(own) + 1) % 3]


def test_retrieval_section_frames_the_right_picture(tmp_path: Path) -> None:
    dataset = coloured(tmp_path)
    rows, images = looks(dataset)
    page = Page(retrieval(dataset, rows, images))
    found = page.titled("pictures found by captions")
    queries = [text for text, _ in found["items"]]
    figures = found["figures"]
    position = 0
    assert len(queries) == 8
    for query in queries:
        # Ten pictures of the right colour are all as near, so often the right one is not among the first five.
        own = figures[position : position + 5]
        position += 5
        assert {colour_of(source) for _, _, source in own} == {next(c for c in COLOURS if c in query)}
        if not any(kind == "right" for _, kind, _ in own):
            caption, kind, _ = figures[position]
            position += 1
            assert kind == "right"
            number = int(re.match(r"no\. (\d+), ", caption)[1])  # type: ignore[index]
            assert 6 <= number <= 10
    assert position == len(figures)

    described = page.titled("captions found by pictures")
    lists = described["items"]
    assert len(described["figures"]) == 8
    assert all(
        any(kind == "own" for _, kind in lists[i + 1 : i + 7])
        for i, (_, k) in enumerate(lists)
        if k == "described"
    )
    assert sum(kind == "described" for _, kind in lists) == 8


def test_evaluation_page_with_hostile_texts_shows_them_as_text(tmp_path: Path) -> None:
    dataset = coloured(tmp_path)
    rows, images = looks(dataset)
    file = tmp_path / "names.txt"
    file.write_text("red <script>alert(1)</script>\ngreen' onload=\"x\nblue&amp;</td></section>\n")
    results = zero_shot_evaluation(dataset, classnames=file)(rows, images, embed_colours)
    results[0]["dataset"] = "<img src=x>"
    arguments = (results, dataset, rows, images, embed_colours, MAX_PICTURES)
    sections = [zero_shot_section(*arguments, classnames=file)]
    page = Page(evaluation_page("<u>run</u>", "</main>", sections) + retrieval(dataset, rows, images))
    assert not page.tags & {"script", "u", "link", "iframe"}
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert page.titled("confusions")["cells"][1][0] == "1 red <script>alert(1)</script>"
    assert any("<u>thing</u>" in text for text, _ in page.titled("pictures found by captions")["items"])


def test_evaluation_page_loads_nothing_and_is_deterministic(tmp_path: Path) -> None:
    dataset = coloured(tmp_path)
    rows, images = looks(dataset, wrong=(0, 1, 2))
    text = zero_shot(dataset, rows, images) + retrieval(dataset, rows, images)
    assert text == zero_shot(dataset, rows, images) + retrieval(dataset, rows, images)
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)


@pytest.mark.parametrize("allowed", [0, 2, 7, 30, MAX_PICTURES])
def test_sections_respect_max_pictures(tmp_path: Path, allowed: int) -> None:
    dataset = coloured(tmp_path)
    rows, images = looks(dataset, wrong=tuple(range(15)))
    images[::2] = images[::-2]
    for text in (zero_shot(dataset, rows, images, allowed), retrieval(dataset, rows, images, allowed)):
        assert len(Page(text).sources) <= allowed
        assert ("no room for pictures" in text) == (allowed == 0 or (allowed == 2 and "recall@1" in text))
        assert "There is none" not in text
    # The limit of the whole page: two megabytes.
    assert MAX_PICTURES * MAX_BYTES * 4 / 3 < 2e6


def test_sections_without_sources_show_boxes(tmp_path: Path) -> None:
    dataset = coloured(tmp_path)
    rows, images = looks(dataset, wrong=(0, 1))
    (tmp_path / "tars" / "0.tar").unlink()
    for text in (zero_shot(dataset, rows, images), retrieval(dataset, rows, images)):
        page = Page(text)
        assert not page.sources
        assert "no picture" in text
        assert "A box replaces a picture" in text


def test_zero_shot_section_of_many_classes_shows_ends_and_worst_confusions(tmp_path: Path) -> None:
    count = 60
    writer = DatasetWriter(tmp_path / "d")
    labels = np.repeat(np.arange(count), 4)
    for i, label in enumerate(labels.tolist()):
        writer.add(Row(f"k{i}", 0, 0, 0, (), label))
    names = [f"class {k}" for k in range(count)]
    dataset = writer.finish(seed=0, sources=[], classnames=names, templates=["{c}"])
    eye = np.eye(count, dtype=np.float32)
    seen = labels.copy()
    seen[labels == 7] = 9  # all four
    seen[(labels == 8) & (np.arange(len(labels)) % 4 < 3)] = 1  # three of four
    seen[np.flatnonzero(labels == 30)[0]] = 31
    rows, embed = np.arange(len(labels)), lambda texts: eye[[int(t.split()[1]) for t in texts]]
    results = zero_shot_evaluation(dataset)(rows, eye[seen], embed)
    page = Page(evaluation_page("r", "a", [zero_shot_section(results, dataset, rows, eye[seen], embed)]))
    recalls = page.titled("recall of the classes")["cells"][1:]
    assert len(recalls) == 41
    assert [(row[0], row[2]) for row in recalls[:3]] == [
        ("class 7", "0.0 %"), ("class 8", "25.0 %"), ("class 30", "75.0 %"),
    ]  # fmt: skip
    assert recalls[20] == ["..."]
    assert page.titled("confusions")["cells"] == [
        ["on the picture", "called", "times", "of its images"],
        ["class 7", "class 9", "4", "100.0 %"],
        ["class 8", "class 1", "3", "75.0 %"],
        ["class 30", "class 31", "1", "25.0 %"],
    ]


def test_zero_shot_section_of_multilabel_images_accepts_any_label(tmp_path: Path) -> None:
    dataset = coloured(tmp_path, 6)
    keys = [key for block in dataset.iter_blocks() for key in block.keys]
    own = labels_of(dataset)
    file = tmp_path / "several.json"
    # Every image may also be called the next colour; the last row counts for nothing.
    lists = [[int(k), int(k + 1) % 3] for k in own[:-1]] + [[]]
    file.write_text(json.dumps(dict(zip(keys, lists, strict=True))))
    rows, images = looks(dataset, wrong=tuple(range(3)))
    results = zero_shot_evaluation(dataset, labels=file)(rows, images, embed_colours)
    sections = [zero_shot_section(results, dataset, rows, images, embed_colours, labels=file)]
    page = Page(evaluation_page("r", "a", sections))
    assert results[0]["metrics"]["acc1"] == 1
    assert len(page.titled("named right")["figures"]) == 5
    assert not page.titled("named wrong")["figures"]


def test_retrieval_section_of_several_languages_alternates(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "d")
    for i in range(6):
        texts = (f"{NAMES[i % 3]} {i}", f"rot {NAMES[i % 3]} {i}")
        writer.add(Row(f"k{i}", 0, 0, 0, texts, languages=("en", "de")))
    dataset = writer.finish(seed=0, sources=[])
    rows, images = np.arange(6), np.eye(3, dtype=np.float32)[np.arange(6) % 3]
    page = Page(retrieval(dataset, rows, images))
    queries = [text for text, _ in page.titled("pictures found by captions")["items"]]
    assert [q[:4] for q in queries[:4]] in (["en: ", "de: "] * 2, ["de: ", "en: "] * 2)
    assert len(queries) == 8
    drawn = {l: [q[-1] for q in queries if q.startswith(l)] for l in ("en", "de")}
    assert drawn["en"] != drawn["de"]  # not the same pictures in every language
    # An English caption is never among the German ones.
    for text, kind in page.titled("captions found by pictures")["items"]:
        if kind != "described":
            assert ("de: " in text) == ("rot" in text)
    figures = page.titled("retrieval")["cells"]
    assert [row for row in figures if len(row) == 1] == [["de"], ["en"], ["average"]]


@settings(deadline=None)
@given(st.lists(st.text(max_size=3), max_size=5), st.lists(st.text(max_size=3), max_size=5))
def test_memoized_embeds_texts_once(first: list[str], second: list[str]) -> None:
    asked = []

    def embed(texts: list[str]) -> np.ndarray:
        asked.append(texts)
        return np.array([[len(t)] for t in texts], np.float32).reshape(-1, 1)

    kept = memoized(embed)
    for texts in (first, second, first, second):
        np.testing.assert_array_equal(kept(texts), np.array([[len(t)] for t in texts]).reshape(-1, 1))
    assert asked == ([first] if first == second else [first, second])


def test_few_shot_section_shows_each_draw() -> None:
    result = {
        "dataset": "pets", "train_dataset": "pets-train", "images": 3669, "classes": 37, "train_images": 3680,
        "metrics": {"acc1_1shot": 0.5}, "seeds": {"acc1_1shot": [0.4, 0.5, 0.6]}, "chance": {"acc1_1shot": 1 / 37},
        "interval_95": {"acc1_1shot": [0.39, 0.61]},
    }  # fmt: skip
    page = Page(evaluation_page("r", "a", [few_shot_section(result)]))
    assert page.titled("pets: few-shot from pets-train")["cells"][1] == [
        "1 image per class", "50.0 %", "40.0, 50.0, 60.0", "39.0 to 61.0 %", "2.7 %", "",
    ]  # fmt: skip


def test_shorten_cuts_long_captions() -> None:
    assert page_module._shorten("x" * 10_000) == "x" * 197 + "..."


# --- the command


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path) -> tuple[str, str]:
    """Two datasets of coloured pictures, embedded by the tower of `trained_run`."""
    path = tmp_path_factory.mktemp("page")
    for name in ("train", "test"):
        coloured(path / name, prefix=name)
        assert main(["embed", str(path / name / "set"), "--tower", str(tiny_vit)]) == 0
    return str(path / "train" / "set"), str(path / "test" / "set")


def test_eval_writes_page_and_figures(
    trained_run: Path, sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = sets
    command = ["eval", str(trained_run), "--zero-shot", test, "--retrieval", test]
    assert main([*command, "--json", str(tmp_path / "plain.json")]) == 0
    out, page = tmp_path / "out.json", tmp_path / "deep" / "page.html"
    assert main([*command, "--few-shot", train, test, "--json", str(out), "--page", str(page)]) == 0
    results = json.loads(out.read_text())
    assert results[:2] == json.loads((tmp_path / "plain.json").read_text())  # a page changes no figure
    few = results[2]
    assert (few["task"], few["dataset"], few["train_dataset"]) == (
        "few_shot_classification",
        "test/set",
        "train/set",
    )
    assert few["model"] == "run"
    assert few["metrics"].keys() == few["chance"].keys() == few["interval_95"].keys() == few["seeds"].keys()
    assert few["metrics"]["acc1_10shot"] == 1  # one colour each
    shown = capsys.readouterr().out
    assert re.search(r"test/set from train/set +few-shot +acc1_5shot", shown)
    assert "test/set from train/set few-shot: images 30, classes 3" in shown
    read = Page(page.read_text())
    titles = [s["title"] for s in read.sections]
    assert [t for t in titles if "classification" in t or "retrieval" in t or "few-shot" in t] == [
        "set: zero-shot classification", "set: retrieval", "test/set: few-shot from train/set",
    ]  # fmt: skip
    assert read.sources
    # One file per result in a directory, none over another.
    (tmp_path / "many").mkdir()
    assert (
        main(
            [*command, "--few-shot", train, test, "--few-shot", test, train, "--json", str(tmp_path / "many")]
        )
        == 0
    )
    assert len(list((tmp_path / "many").iterdir())) == 4


def test_eval_few_shot_alone_and_mistakes(
    trained_run: Path, sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = sets
    assert main(["eval", str(trained_run), "--few-shot", train, test]) == 0
    bare = DatasetWriter(tmp_path / "bare")
    bare.add(Row("k", 0, 0, 0, ("a caption",)))
    bare.finish(seed=0, sources=[])
    capsys.readouterr()
    for arguments, message in (
        (["--few-shot", train], "expected 2 arguments"),
        (["--few-shot", train, train], "have the same rows"),
        (["--few-shot", train, str(tmp_path / "no")], "/no does not exist"),
        (["--few-shot", str(tmp_path / "bare"), test], "/bare has no labels for few-shot"),
        (["--few-shot", train, test, "--page", str(tmp_path)], f"--page {tmp_path} is a directory"),
        (
            ["--few-shot", train, test, "--page", "/proc/version/p.html"],
            "--page /proc/version/p.html cannot be written",
        ),
    ):
        assert main(["eval", str(trained_run), *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
