"""The exceptions that users see as one line, and the reasons of other exceptions."""

from __future__ import annotations

import errno
import resource


class UserError(Exception):
    """A mistake that the user can fix; the message names the object, the problem and the action in one line.

    The command line prints it on stderr and exits with `exit_status`.
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        """Take the message; characters of a file name or file that cannot be printed are escaped in it."""
        super().__init__(printable(message))

    @property
    def problem(self) -> str:
        """The message without its action, for a message with another action."""
        message = str(self)
        return message.rpartition("; ")[0] or message


class MachineError(UserError):
    """A failure of the machine or of other processes, with nothing wrong in the command."""

    exit_status = 1


def printable(text: str) -> str:
    """Return a text with escapes for line ends and all other characters that cannot be printed."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UnsupportedModelError(UserError):
    """Weights of a model that lit_fast has no JAX code for; PyTorch's code may compute it."""


def first_line(error: BaseException, length: int = 200) -> str:
    """Return the first line of an exception's text, cut at `length`; the exception's type where it has no text.

    Characters that cannot be printed are escaped.
    """
    lines = str(error).strip().splitlines()
    return printable(lines[0][:length] if lines else type(error).__name__)


def os_reason(error: OSError) -> str:
    """Return the text of an operating system's error; that of too many open files has the limit."""
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"{error.strerror}, of which this process may have {limit}; raise the limit with ulimit -n"
    return error.strerror or first_line(error)


def unreadable(location: object, error: OSError) -> UserError:
    """Return the error for a file or directory that the operating system does not let us read."""
    return UserError(
        f"{location} cannot be read: {os_reason(error)}; fix the cause, then rerun the same command"
    )


def is_shortage(error: OSError) -> bool:
    """Return whether the process or machine lacks open files or memory, so that nothing is wrong with the file."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
