"""The command `lit-fast`: finds its subcommands through entry points and turns errors into exit codes.

A command is a function `command(parser) -> run`: it adds its arguments to the parser and returns the
function that does the work, `run(args) -> None`. The first line of its docstring is its help.
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
from typing import NoReturn

from lit_fast.errors import UserError
from lit_fast.version import __version__

Run = Callable[[argparse.Namespace], None]
Command = Callable[[argparse.ArgumentParser], Run]

# The order of the work, which is the order of the help.
_ORDER = (
    "index",
    "embed",
    "import-features",
    "tokenize",
    "plan",
    "train",
    "eval",
    "export",
    "classify",
    "search",
    "compare",
    "info",
    "verify",
    "towers",
    "demo",
)


class _Parser(argparse.ArgumentParser):
    """argparse, with a mistake reported in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns the exit status: 0 when the job is done, 2 for a user's mistake, 130 after Ctrl-C and
    143 after SIGTERM (both leave work that the same command goes on with).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            later = threading.Timer(0.05, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        came.append(number)
        # Nothing between here and there swallows a SystemExit.
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, stop)
        _dispatch(argv)
        sys.stdout.flush()
    except BaseException as error:
        if came:
            how = "\nlit-fast: interrupted" if came[0] == signal.SIGINT else "lit-fast: terminated"
            print(f"{how}; the same command goes on from here", file=sys.stderr)
            return 128 + came[0]
        return _status(error)
    return 0


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported; extension modules do not bear being cut short there."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _status(error: BaseException) -> int:
    """Says what went wrong, if it is not a defect, which is raised again."""
    if isinstance(error, UserError):
        print(f"lit-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if isinstance(error, BrokenPipeError):  # `lit-fast info D | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, OSError):  # a full disk, a missing permission: the file and the reason say it all
        where = f"{error.filename}: " if error.filename else ""
        print(f"lit-fast: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    raise error


def _dispatch(argv: list[str]) -> None:
    found = {e.name: e for e in entry_points(group="lit_fast.commands")}
    names = [n for n in _ORDER if n in found] + sorted(set(found) - set(_ORDER))
    parser = _Parser(
        prog="lit-fast",
        description="Embed every image once, then train a SigLiT text tower against the features.",
        epilog="`lit-fast COMMAND --help` explains one command; `lit-fast demo` shows them all at work.",
    )
    parser.add_argument("--version", action="version", version=f"lit-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = argv[0] if argv and argv[0] in found else None
    runs: dict[str, Run] = {}
    for name in names if wanted is None else [wanted]:
        command: Command = found[name].load()
        text = inspect.cleandoc(command.__doc__ or "")
        sub = commands.add_parser(
            name,
            help=text.splitlines()[0] if text else "",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        runs[name] = command(sub)
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.unknown = rest
    runs[args.command](args)


def keep_compiled() -> None:
    """Turn on JAX's persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR names another directory."""
    import jax

    from lit_fast.storage.cache import cache_directory
    from lit_fast.storage.paths import join

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", join(cache_directory(), "compiled"))


if __name__ == "__main__":
    raise SystemExit(main())
