"""The README and the pages of docs/: links and files that exist, and the intervals of the code."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from lit_fast.data import dataset
from lit_fast.embed import commits, shard_writer
from lit_fast.storage import buckets, lock
from lit_fast.train import mirror

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    links = re.findall(
        r"\]\(([^)#:]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    )
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_the_repository_exist(path):
    named = re.findall(r"`((?:lit_fast|embed|train|tests|configs|docs)/[\w/.-]+)`", path.read_text())
    assert named or path.parent.parent != ROOT / "docs"
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_and_targets_exist(path):
    text = " ".join(path.read_text().split())
    programs = re.findall(r"python -m ((?:benchmarks|lit_fast)[.\w]*)", text)
    assert not [name for name in programs if importlib.util.find_spec(name) is None]
    targets = re.findall(r"(?:`|```(?:sh)? )make ([\w-]+)", text)
    assert not [name for name in targets if f"\n{name}:" not in (ROOT / "Makefile").read_text()]


def test_intervals_of_the_page_on_storage_are_those_of_the_code():
    text = " ".join((ROOT / "docs/design/storage.md").read_text().split())
    for shown in (
        f"seen no new beat for **{lock.ABANDONED_SECONDS:.0f} s by its own clock**",
        f"writes a new beat every {lock.TOUCH_SECONDS:.0f} s",
        f"if the last beat is more than {lock.ABANDONED_SECONDS / 2:.0f} s old",
        f"are at most {mirror.PUSH_SECONDS:.0f} seconds behind",
        f"last copy of the journal, {commits.SAVE_SECONDS / 60:.0f} minutes",
        f"the first {shard_writer.MAX_COPY_BYTES >> 20} MiB",
        f"a block of {dataset.BLOCK} rows is one request for a range of bytes, {buckets.THREADS} at a time",
        f"each shard of {dataset.SHARD:,} rows".replace(",", " "),
    ):
        assert shown in re.sub(r" │ │ ", " ", text), shown


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_headings(path):
    assert not [
        (link, anchor)
        for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", path.read_text())
        if anchor not in headings(path.parent / link if link else path)
    ]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/design/*.md")), ids=lambda path: path.name)
def test_figure_of_a_design_page_is_the_one_that_its_program_draws(page):
    program = runpy.run_path(str(ROOT / "docs/design/figures.py"))
    assert page.with_suffix(".svg").read_text() == program[page.stem]().svg(), (
        "run: python docs/design/figures.py"
    )
    assert f"]({page.stem}.svg)" in page.read_text()


def headings(path):
    """Return the anchors that GitHub and the site give the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def figures(text):
    return set(re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)", text))


def test_performance_rows_have_the_figures_of_the_tables_that_they_link():
    tables = re.split(r"^## ", (ROOT / "benchmarks/README.md").read_text(), flags=re.MULTILINE)
    tables = {re.sub(r"[^\w\- ]", "", t.partition("\n")[0].lower()).replace(" ", "-"): t for t in tables}
    rows = re.findall(
        r"^\| \[.*?\]\(\.\./benchmarks/README\.md#([\w-]+)\)(.*)",
        (ROOT / "docs/performance.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) > 10
    wrong = {row: missing for anchor, row in rows if (missing := figures(row) - figures(tables[anchor]))}
    assert not wrong


def test_readme_rows_have_the_figures_of_the_page_on_performance():
    section = (ROOT / "README.md").read_text().partition("## How fast")[2].partition("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert len(figures(rows)) > 15
    assert not figures(rows) - figures((ROOT / "docs/performance.md").read_text())
