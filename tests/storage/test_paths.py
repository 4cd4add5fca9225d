"""Names of hidden files and of leftovers of other programs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.storage.paths import is_junk

JUNK = [
    ".DS_Store",
    "._x.jpg",
    "__MACOSX",
    "Thumbs.db",
    "THUMBS.DB",
    "desktop.ini",
    "@eaDir",
    "$RECYCLE.BIN",
    "lost+found",
    ".ipynb_checkpoints",
    "x.jpg~",
    "~$captions.csv",
]
USED = ["x.jpg", "n01440764", "__a__", "a~b.jpg", "macosx", "lost", "x..jpg", "a.b"]


@pytest.mark.parametrize("name", JUNK)
def test_is_junk_finds_a_name_anywhere_in_a_path(name: str) -> None:
    assert all(is_junk(path) for path in (name, f"a/{name}", f"{name}/a/x.jpg", f"./{name}/x.jpg"))


@given(st.lists(st.sampled_from([*USED, ".", ".."]), min_size=1, max_size=4))
def test_is_junk_takes_no_other_path(parts: list[str]) -> None:
    assert not is_junk("/".join(parts))
