"""Form and words of the texts that users see."""

from __future__ import annotations

import re

import pytest

from lit_fast.errors import UserError, unreadable
from tests.messages import Message, messages

# HOUSE words, and wordings for which there is one of the same meaning.
AVOIDED = re.compile(
    r"\b(anew|mend|told|begun|meanwhile|works out|goes on|no more|omit|try again|known are|there are \{|please|sorry"
    r"|oops|cannot be done|whoever|alone)\b|; (it has|there are) |\bis no (file|list|number|figure|tuple|array)\b"
)
# The problem itself says what is needed, or the message asks a question.
NAMES_THE_ACTION = re.compile(r" must be | needs? |; did you mean ")
# Their field at the end is a message or a problem that has its action.
WITH_ANOTHER_MESSAGE = {
    "{first} ({len(problems)} of {len(images)} images failed)",
    "unknown config key {key} {where}{hint}",
    "tokenizer {location}: {error}",
    "{origin}: {error}",
    "{origin}: {error}, then index it again",
    "{error}{hint}",
    "{path} is not a directory here, and as a repository {error}",
    "LIT_FAST_CACHE: {error}",
    "{self.name} {hub_problem(raised, self.name, 'dataset', path)}",
    "{url} {problem}",
    "tower {spec}: {error}",
    "{_mismatch(name, error)}",
    "{_problem(name, recipe, error)}",
    "{str(error)}",
    "{self._missing_text(missing)}",
    "{self._missing_text([0], problem)}",
    "{self._missing_text([int(rank) for rank in rest.split(',')])}",
    "{spec} does not exist here, and {error}",
    "{str(absent)}",
    "{spec} cannot be downloaded: {error}, or {action}",
    "{file}: {error}",
    "{spec}: {error}",
    "{spec}: {error}{_known()}",
    "source {spec} is not of the form wds:NAME{_known()}",
    "{path} {problem}",
    "source {directory} {problem}",
    "no tokenizer with {vocab} pieces can be trained on the {used} captions of {dataset.path}: {reason}",
    "{directory} is written but was not uploaded: {error}",
    "{str(error).replace(self.local, self.url)}",
    "{self.url} cannot be written: {first_line(error)}",
    "{slices[0]['error']}",
    "{problem}",
}
MESSAGES = list(messages())
ERRORS = [m for m in MESSAGES if m.kind == "error"]


def shown(wrong: list[Message]) -> str:
    return "\n".join(f"{m.where}: {m.text}" for m in wrong)


def test_messages_are_found():
    assert len(ERRORS) > 500
    assert {m.kind for m in MESSAGES} == {"error", "problem", "reason", "status", "result", "help"}


def test_errors_name_an_action():
    wrong = [
        m
        for m in ERRORS
        if "; " not in m.text and not NAMES_THE_ACTION.search(m.text) and m.text not in WITH_ANOTHER_MESSAGE
    ]
    assert not wrong, shown(wrong)


def test_exceptions_to_the_action_are_in_use():
    assert not WITH_ANOTHER_MESSAGE - {m.text for m in ERRORS}


def test_errors_and_their_parts_are_one_line_without_period():
    wrong = [
        m
        for m in MESSAGES
        if m.kind in ("error", "problem", "reason") and (m.text[-1:] in ".;:,!" or "\n" in m.text)
    ]
    assert not wrong, shown(wrong)


def test_messages_have_no_doubled_or_outer_spaces():
    code = re.compile(r"\{[^}]*\}")
    wrong = [m for m in MESSAGES if "  " in code.sub("{}", m.text) or m.text != m.text.strip(" ")]
    assert not wrong, shown(wrong)


def test_messages_have_no_avoided_word():
    wrong = [m for m in MESSAGES if AVOIDED.search(re.sub(r"\{[^}]*\}", "{}", m.text))]
    assert not wrong, shown(wrong)


@pytest.mark.parametrize(
    ("message", "problem"),
    [("a is bad; do b", "a is bad"), ("a; b is bad; do c", "a; b is bad"), ("a is bad", "a is bad")],
)
def test_problem_of_an_error_is_its_text_before_the_action(message: str, problem: str):
    assert UserError(message).problem == problem


def test_unreadable_names_the_reason_and_the_action():
    error = unreadable("d/f", PermissionError(13, "Permission denied"))
    assert str(error) == "d/f cannot be read: Permission denied; fix the cause, then rerun the same command"
