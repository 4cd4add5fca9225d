"""The command `lit-fast`: finds its subcommands through entry points and turns errors into exit codes.

A command is a function `command(parser) -> run`. It adds its arguments to the parser and returns the function
`run(args) -> None` that does the work. Its docstring is the text of `lit-fast COMMAND --help`.
"""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from types import FrameType
from typing import Any, NoReturn

from lit_fast.errors import MachineError, UserError, first_line, os_reason
from lit_fast.storage.machine import available_memory, open_standard_descriptors, raise_open_file_limit
from lit_fast.utils.output import SIGPIPE_STATUS, failure, flush, prepare_streams
from lit_fast.utils.signals import SIGNALS, install_handler
from lit_fast.version import __version__

Run = Callable[[argparse.Namespace], Any]  # returns what `lit_fast.api` returns
Command = Callable[[argparse.ArgumentParser], Run]

# The commands in the order of use, with their lines in `lit-fast --help`, which loads none of them.
COMMANDS = {
    "index": "Create a dataset from images and captions, with a fixed order of rows",
    "embed": "Embed every image of a dataset with a frozen vision tower",
    "import-features": "Create a dataset from features that another program computed",
    "tokenize": "Convert the captions of a dataset to token ids",
    "plan": "Estimate memory, time and price of a training before it starts",
    "train": "Train a text tower; the same command resumes an interrupted run",
    "race": "Train on the features of several towers and rank them",
    "eval": "Evaluate a run: zero-shot and few-shot classification, retrieval",
    "export": "Export a trained model for lit_fast, big_vision, open_clip, transformers or ONNX",
    "classify": "Classify images with a trained model and any labels",
    "search": "Search the images of a dataset by text or image",
    "serve": "Search a dataset in the browser, by text or image",
    "compare": "Compare runs: configuration, cost and results",
    "info": "Show the contents of a dataset or run and the next command",
    "push": "Share a dataset without its images on the Hugging Face Hub",
    "pull": "Get a dataset that somebody shared, ready for training",
    "verify": "Check every stored byte of a dataset",
    "towers": "List public vision towers",
    "demo": "Run all stages on generated images, in minutes on a laptop",
}


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
      The exit status: 0 when the job is done, 2 for a user's mistake, 1 for a failure of other processes or of the
      machine's memory, 130 after Ctrl-C, 141 if the reader of the output is gone and 143 after SIGTERM. After a
      signal, the same command resumes the work.
    """
    open_standard_descriptors()
    prepare_streams()
    raise_open_file_limit()
    argv = list(sys.argv[1:] if argv is None else argv)
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            later = threading.Timer(0.05, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        received.append(number)
        # Neither is caught between here and the handler below.
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    try:
        install_handler(stop, [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN])
        _check_directory()
        try:
            run_command(argv)
        except SystemExit:  # of --help
            flush()
            raise
    except BaseException as error:
        if received:
            event = "\nlit-fast: interrupted" if received[0] == signal.SIGINT else "lit-fast: terminated"
            failure(f"{event}; rerun the same command to continue")
            return 128 + received[0]
        return _exit_status(error)
    return 0


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported; an exception there can leave extension modules half initialized."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _check_directory() -> None:
    """Raise UserError if the current directory was deleted: relative paths have no meaning then."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the current directory cannot be used: {os_reason(error)}; change to another"
        ) from None


def _exit_status(error: BaseException) -> int:
    """Print an error of the user or of the machine in one line; raise any other again."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, BrokenPipeError):  # of a program that this one writes to
        return SIGPIPE_STATUS
    known = _as_user_error(error)
    if known is None:
        raise error
    failure(f"lit-fast: error: {' '.join(str(known).split())}")
    return known.exit_status


def _as_user_error(error: BaseException) -> UserError | None:
    """Return the line for an error that the user or the machine causes; None for a defect."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):  # a full disk, a missing permission
        file = f"{error.filename}: " if error.filename else ""
        return UserError(f"{file}{os_reason(error)}; fix the cause, then rerun the same command")
    no_room = isinstance(error, ImportError) and "failed to map segment" in str(error)  # of ulimit -v
    if isinstance(error, MemoryError) or no_room:
        memory = available_memory() / 2**30
        return MachineError(
            f"this process is out of memory: it may use {memory:.1f} GiB; use a smaller batch or more memory"
        )
    if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
        return UserError(
            f"the name {error.object[:200]!r} cannot be written in this locale, {sys.getfilesystemencoding()}; set "
            "PYTHONUTF8=1"
        )
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(
        error
    ):  # JAX may not be loaded here
        return MachineError(f"the device is out of memory: {first_line(error)}; use a smaller batch")
    return None


def run_command(argv: list[str]) -> Any:
    """Run one subcommand.

    Raises:
      UserError: a mistake in the arguments or the inputs.
    """
    found = {e.name: e for e in entry_points(group="lit_fast.commands")}
    parser = _Parser(
        prog="lit-fast",
        description="Embed every image once, then train a SigLiT text tower against the features.",
        epilog="`lit-fast COMMAND --help` explains one command; `lit-fast demo` runs them all.",
    )
    parser.add_argument("--version", action="version", version=f"lit-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    runs: dict[str, Run] = {}
    if argv and argv[0] in found:  # only the command that is used is loaded
        command: Command = found[argv[0]].load()
        text = inspect.cleandoc(command.__doc__ or "")
        format_class = argparse.RawDescriptionHelpFormatter
        runs[argv[0]] = command(
            commands.add_parser(argv[0], description=text, formatter_class=format_class, allow_abbrev=False)
        )
    else:
        for name in (*COMMANDS, *sorted(set(found) - set(COMMANDS))):
            commands.add_parser(name, help=COMMANDS.get(name, ""))
    args, rest = parser.parse_known_args(_normalize(argv))
    if rest and not getattr(args, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.unknown = rest
    return runs[args.command](args)


def _normalize(argv: list[str]) -> list[str]:
    """Return the arguments with flags as they are declared: `--batch-size`, and `--text.mask_padding` for a key.

    A negative number after a key is joined to it, as argparse takes -1e1 for a flag.
    """
    out: list[str] = []
    for number, word in enumerate(argv):
        if word == "--":
            return out + argv[number:]
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            name = flag[2:]
            name = name.replace("-", "_") if "." in name else name.replace("_", "-")
            out.append(f"--{name}{equals}{value}")
        elif word.startswith("-") and _is_number(word) and out and _is_key(out[-1]):
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def _is_key(word: str) -> bool:
    return word.startswith("--") and "." in word and "=" not in word


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
