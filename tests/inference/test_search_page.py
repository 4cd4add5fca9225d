"""What a search shows: tables for a terminal, JSON, and a page with the pictures."""

import base64
import io
import re

from PIL import Image

from lit_fast.inference.search import Hit
from lit_fast.inference.search_page import as_json, format_answers, search_page
from lit_fast.inference.searcher import Answer
from tests.helpers import encoded, picture

HITS = (
    Hit(7, 0.5, "a/7", ("first <b>caption</b>", "second")),
    Hit(2, 0.25, "b\x1b[31m", ("line one\nline two \x1b]0;x\x07",), "cc3m/00000.tar"),
    Hit(9, -0.125, "c", ()),
)
ANSWER = Answer("a <i>red</i> boat", "text", HITS, (0.75, 0.01, 1e-6))


def test_format_answers_has_a_line_per_row_without_control_characters():
    text = format_answers([ANSWER, Answer("cat.jpg", "image", HITS[:1])], 200)
    lines = text.splitlines()
    assert lines[0] == "a <i>red</i> boat"
    assert lines[1].split() == ["rank", "cosine", "probability", "row", "key", "source", "caption"]
    assert lines[2].split() == ["1", "0.5000", "75", "%", "7", "a/7", "first", "<b>caption</b>"]
    assert "cc3m/00000.tar  line one line two ?]0;x?" in lines[3]
    assert "source" not in text.split("image cat.jpg")[1]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert "image cat.jpg" in lines
    assert "probability" not in text.split("image cat.jpg")[1]
    assert max(map(len, format_answers([ANSWER], 30).splitlines()[1:])) <= 30


def test_as_json_has_all_fields():
    found = as_json([ANSWER])[0]
    assert (found["query"], found["kind"]) == ("a <i>red</i> boat", "text")
    assert found["results"][0] == {
        "rank": 1, "row": 7, "key": "a/7", "source": "", "cosine": 0.5, "probability": 0.75,
        "captions": ["first <b>caption</b>", "second"],
    }  # fmt: skip


def test_search_page_shows_pictures_and_escapes_texts(tmp_path):
    query = tmp_path / "query.png"
    query.write_bytes(encoded(picture(1), "PNG"))
    files = {7: encoded(picture(7)), 2: b"no image"}
    page = search_page("in <d>", "note", [ANSWER, Answer(str(query), "image", HITS[:1])], files.get)
    assert "<b>" not in page
    assert "<i>" not in page
    assert "a &lt;i&gt;red&lt;/i&gt; boat" in page
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 3  # row 7 twice, and the query
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as shown:
        assert shown.size == (48, 40)
    assert page.count("no picture") == 2
    assert "1. cosine 0.500\nprobability 75\N{NO-BREAK SPACE}%\na/7\nfirst" in page


def test_search_page_of_many_hits_stays_small():
    many = Answer("q", "text", tuple(Hit(r, 0.0, f"{r}", ("x" * 100_000,)) for r in range(300)))
    page = search_page("t", "n", [many], lambda row: None)
    assert page.count("<figure") == 100
    assert "The first 100 of 300." in page
    assert len(page) < 200_000
