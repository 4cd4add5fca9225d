"""The page: complete, self-contained, and nothing in it is taken for markup."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import Any

from PIL import Image

from lit_fast.demo.page import build_page, curves
from lit_fast.report.gallery import Figure, thumbnail

VOID = {"meta", "img", "wbr"}


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 10, 10)).save(file, "JPEG")
    return file.getvalue()


def result(dataset: str, task: str, values: dict[str, float]) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "task": task,
        "metrics": values,
        "images": 600,
        "chance": dict.fromkeys(values, 0.1),
        "interval_95": {k: [v - 0.05, v + 0.05] for k, v in values.items()},
    }


METRICS = [
    {"step": 10, "loss": 5.5},
    {"step": 100, "loss": 2.25},
    {"step": 100, "zeroshot/acc1": 0.5, "retrieval/image_retrieval_recall@1": 0.25},
    {"step": 200, "loss": 1.5},
    {"step": 200, "zeroshot/acc1": 0.75, "retrieval/image_retrieval_recall@1": 0.5},
]
RESULTS = [
    result("zeroshot", "zeroshot_classification", {"acc1": 0.75}),
    result(
        "retrieval", "zeroshot_retrieval", {"image_retrieval_recall@1": 0.5, "text_retrieval_recall@5": 0.9}
    ),
]


def page(**changes: Any) -> str:
    source = thumbnail(picture())
    right = ("two red stars", [Figure(source, "0.9", "right"), Figure(source, "0.8")])
    wrong = ('a blue <ring> & "more"', [Figure(source), Figure(source), Figure(source, "no. 42", "right")])
    arguments: dict[str, Any] = {
        "metrics": METRICS,
        "results": RESULTS,
        "right": [right],
        "wrong": [wrong],
        "confusions": [
            ("red star", {"red star": 0.75, "blue ring": 0.25}),
            ("blue ring", {"blue ring": 1.0}),
        ],
        "commands": ["lit-fast index demo/scenes --out demo/train"],
        "seconds": 131.0,
    }
    return build_page(**(arguments | changes))


class Balance(HTMLParser):
    """Checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_demo_page_is_well_formed_and_loads_nothing() -> None:
    text = page()
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    assert balance.tags.count("svg") == 2
    assert "script" not in balance.tags
    assert set(re.findall(r'(?:src|href)="(\w+:[^,]*)', text)) == {"data:image/jpeg;base64"}
    assert "http" not in text
    assert "url(" not in text


def test_demo_page_shows_chance_levels_and_intervals() -> None:
    text = page()
    for value in ("75.0 %", "50.0 %", "90.0 %", "10.0 %", "70.0 to 80.0 %", "45.0 to 55.0 %"):
        assert value in text
    assert "2m11s" in text
    assert "took" not in page(seconds=None)


def test_demo_page_escapes_text() -> None:
    text = page(commands=["lit-fast index 'a & <b>'"])
    assert "a blue &lt;ring&gt; &amp; &#34;more&#34;" in text
    assert "&#39;a &amp; &lt;b&gt;&#39;" in text
    assert "<ring>" not in text
    assert "<b>'" not in text


def test_demo_page_frames_the_right_picture() -> None:
    text = page()
    assert text.count('class="right"') == 2
    assert "no. 42" in text
    assert "There is none." in page(wrong=[])


def test_curves_have_evaluations_and_chance_levels() -> None:
    lines = curves(METRICS, RESULTS)
    assert [line.points for line in lines] == [[(100, 0.5), (200, 0.75)], [(100, 0.25), (200, 0.5)]]
    assert [line.chance for line in lines] == [0.1, 0.1]
    assert curves(METRICS[:2], RESULTS) == []
