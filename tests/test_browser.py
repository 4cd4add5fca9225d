"""The pages in Chromium: at every width, light and dark, by keyboard, for screen readers, with hostile texts."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.helpers import encoded, picture
from tests.pages import HOSTILE, build_pages, serving

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("LIT_FAST_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (LIT_FAST_CHROMIUM)")

WIDTHS = (360, 768, 1200, 1600)
FILES = ("report", "long report", "eval", "compare", "compare many", "race", "search", "demo")
SERVED = {
    "serve": "",
    "serve results": "?q=" + quote(HOSTILE[0]),
    "serve error": "?top=0&q=" + quote(HOSTILE[1]),
}

# The lowest contrast of visible texts with what is behind them: [[contrast, text], ...] below a limit.
CONTRASTS = """limit => {
  const rgba = text => {
    const v = text.match(/[\\d.e-]+/g).map(Number), unit = text.startsWith("color(") ? 255 : 1;
    return [v[0] * unit, v[1] * unit, v[2] * unit, v[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = e => {
    if (!e) return [255, 255, 255];
    const colour = rgba(getComputedStyle(e).backgroundColor);
    return colour[3] === 1 ? colour : over(colour, behind(e.parentElement));
  };
  const luminance = c => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const low = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, e = node.parentElement;
    if (!node.data.trim() || !e.checkVisibility() || e.closest("script,title")) continue;
    const ground = behind(e), style = getComputedStyle(e);
    const colour = over(rgba(e.closest("svg") ? style.fill : style.color), ground);
    const [a, b] = [luminance(colour), luminance(ground)].sort((x, y) => y - x);
    const contrast = (a + .05) / (b + .05);
    if (contrast < limit) low.push([contrast, node.data]);
  }
  return low;
}"""

FOCUSABLE = "a[href], button, input, [tabindex='0']"
# Which of these has the focus, and whether its outline is visible.
FOCUSED = """selector => {
  const e = document.activeElement, style = getComputedStyle(e);
  const visible = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  return [[...document.querySelectorAll(selector)].indexOf(e), visible];
}"""

# Texts of charts that overlap or are cut: [[one, other], ...].
OVERLAPS = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
  const whole = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  const wrong = texts.filter(([, b]) => b.left < whole.left - 1 || b.right > whole.right + 1)
    .map(([t]) => [t, "the border"]);
  texts.forEach(([t, a], i) => texts.slice(i + 1).forEach(([u, b]) => {
    const across = a.left < b.right - 1 && b.left < a.right - 1, along = a.top < b.bottom - 3 && b.top < a.bottom - 3;
    if (across && along) wrong.push([t, u]);
  }));
  return wrong;
})"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def pages(directory: Path, tiny_vit: Path) -> Iterator[dict[str, str]]:
    """The addresses of all pages."""
    files = {name: path.as_uri() for name, path in build_pages(directory, tiny_vit).items()}
    with serving(directory) as url:
        yield files | {name: url + query for name, query in SERVED.items()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """An empty tab, which must have no message in its console at the end; `param` is its colour scheme."""
    context = browser.new_context(color_scheme=getattr(request, "param", "light"))
    tab, messages = context.new_page(), []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    yield tab
    context.close()
    assert [m for m in messages if "status of 400 (Bad Request)" not in m] == []


@pytest.mark.parametrize("tab", ["light", "dark"], indirect=True)
@pytest.mark.parametrize("name", [*FILES, *SERVED])
def test_page_is_readable_at_every_width(pages: dict[str, str], tab: Any, name: str) -> None:
    tab.goto(pages[name])
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, width
        assert tab.evaluate(OVERLAPS) == []
    assert tab.evaluate(CONTRASTS, 4.5) == []
    assert "owned" not in tab.title()
    assert tab.title().strip()


@pytest.mark.parametrize("name", [*FILES, *SERVED])
def test_page_passes_axe(pages: dict[str, str], browser: Any, name: str) -> None:
    tab = browser.new_page(bypass_csp=True, viewport={"width": 600, "height": 900})
    tab.goto(pages[name])
    found = axe.Axe().run(tab).response
    tab.close()
    assert {v["id"]: v["nodes"][0]["html"][:200] for v in found["violations"]} == {}
    checked = {check["id"] for check in found["passes"]}
    assert {"html-has-lang", "document-title", "heading-order", "page-has-heading-one"} <= checked


@pytest.mark.parametrize("name", [*FILES, *SERVED])
def test_page_has_one_title_and_names_for_everything(pages: dict[str, str], tab: Any, name: str) -> None:
    tab.goto(pages[name])
    count = lambda selector: tab.locator(selector).count()  # noqa: E731
    assert count("h1") == 1
    assert count("img:not([alt]), img[alt='']") == 0
    assert count("svg:not([role=img][aria-label])") == 0
    assert count("table:not(:has(th))") == 0
    assert count("input:not([id])") == 0
    for i in range(count("input")):
        assert count(f"label[for={tab.locator('input').nth(i).get_attribute('id')}]") == 1


@pytest.mark.parametrize("name", ["long report", "search", "serve results"])
def test_tab_key_reaches_every_element_in_order_with_visible_focus(
    pages: dict[str, str], tab: Any, name: str
) -> None:
    tab.goto(pages[name])
    for expected in range(tab.locator(FOCUSABLE).count()):
        if expected:
            tab.keyboard.press("Tab")
        else:
            tab.locator(FOCUSABLE).first.focus()
        index, visible = tab.evaluate(FOCUSED, FOCUSABLE)
        assert (index, visible) == (expected, True), tab.evaluate("document.activeElement.outerHTML")[:200]


def test_axes_of_shares_end_at_100_percent(pages: dict[str, str], tab: Any) -> None:
    for name in ("report", "long report", "compare", "compare many", "race", "demo"):
        tab.goto(pages[name])
        marks = re.findall(
            r"([\d.]+) %", " ".join(tab.locator("svg text[text-anchor=end]").all_text_contents())
        )
        assert marks
        assert max(map(float, marks)) <= 100


def test_serve_finds_images_by_a_typed_sentence(pages: dict[str, str], tab: Any) -> None:
    tab.goto(pages["serve"])
    tab.wait_for_selector("#q:focus")
    tab.keyboard.type("picture 5 <b>")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("figure")
    assert tab.input_value("#q") == "picture 5 <b>"
    assert tab.locator("h2").inner_text() == "picture 5 <b>"
    first, second = (tab.locator("figcaption").nth(i).inner_text() for i in (0, 1))
    assert first.startswith("1. cosine 0.")
    assert second.startswith("2. cosine 0.")
    assert any(HOSTILE[i][:8] in tab.locator("figure").all_inner_texts()[0] for i in range(len(HOSTILE)))
    tab.locator("figure a").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/image/*")


@pytest.mark.parametrize("way", ["choose", "drop"])
def test_serve_finds_images_by_an_image(pages: dict[str, str], tab: Any, way: str) -> None:
    tab.goto(pages["serve"])
    data = encoded(picture(5, 48, 45))  # of row 5
    if way == "choose":
        tab.set_input_files("#image", {"name": "<b>.jpg", "mimeType": "image/jpeg", "buffer": data})
    else:
        tab.evaluate(
            """bytes => { const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], "<b>.jpg", {type: "image/jpeg"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: files, cancelable: true})); }""",
            list(data),
        )
    tab.wait_for_selector("figure")
    assert tab.locator("h2").inner_text() == "image the image"
    assert "1. cosine 1.000" in tab.locator("figcaption").nth(1).inner_text()
    assert "05 {{ 7" in tab.locator("figcaption").nth(1).inner_text()


def test_serve_says_why_a_file_cannot_be_used(pages: dict[str, str], tab: Any) -> None:
    tab.goto(pages["serve"])
    tab.set_input_files("#image", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"no image"})
    tab.wait_for_selector("[role=alert]")
    assert tab.locator("[role=alert]").inner_text().startswith("the image cannot be used: ")
    tab.fill("#q", "again")
    tab.click("form[role=search] button")
    tab.wait_for_selector("figure")
