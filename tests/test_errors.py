"""Texts of errors."""

import pytest

from lit_fast.errors import MachineError, UserError, first_line, printable


@pytest.mark.parametrize("kind", [UserError, MachineError])
def test_user_error_with_line_ends_and_control_characters_is_one_line(kind: type[UserError]) -> None:
    assert str(kind("été\n.csv \x00\x1b \udcff")) == "été\\n.csv \\x00\\x1b \\udcff"


def test_printable_leaves_plain_text() -> None:
    assert printable("a 鳥, é") == "a 鳥, é"


def test_first_line_is_cut_and_has_no_control_characters() -> None:
    assert first_line(ValueError("one \x0f\ntwo"), 6) == "one \\x0f"
    assert first_line(ValueError()) == "ValueError"
