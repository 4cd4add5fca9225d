"""The exception that users see as one line, and the first line of other exceptions."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can fix; the message names the object, the problem and the action in one line.

    The command line prints it on stderr and exits with status 2.
    """


class UnsupportedModelError(UserError):
    """Weights of a model that lit_fast has no JAX code for; PyTorch's code may compute it."""


def first_line(error: BaseException, length: int = 200) -> str:
    """Return the first line of an exception's text, cut at `length`; the exception's type where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:length] if lines else type(error).__name__
