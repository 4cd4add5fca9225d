"""The page docs/commands.md: all commands with their arguments, as `--help` has them."""

from __future__ import annotations

import argparse
import inspect
from importlib.metadata import entry_points

from lit_fast.cli.main import COMMANDS
from lit_fast.config import settings
from lit_fast.utils.output import result


def reference() -> str:
    """Return docs/commands.md."""
    found = {e.name: e for e in entry_points(group="lit_fast.commands")}
    rows = [f"| [`lit-fast {name}`](#lit-fast-{name}) | {line} |" for name, line in COMMANDS.items()]
    parts = [
        "# Commands\n\n"
        "`--help` of a command prints the same. Any location may be a URL where its page says so; a mistake is one "
        "line and exit status 2.\n\n"
        "This page is generated: `python -m lit_fast.cli.reference > docs/commands.md`.",
        "\n".join(["| command | |", "|---|---|", *rows]),
    ]
    for name in COMMANDS:
        command = found[name].load()
        parser = argparse.ArgumentParser(prog=f"lit-fast {name}", add_help=False)
        command(parser)
        parts += [
            f"## lit-fast {name}",
            f"```text\n{inspect.cleandoc(command.__doc__ or '')}\n```",
            _table(parser),
        ]
    return "\n\n".join(parts) + "\n"


def _table(parser: argparse.ArgumentParser) -> str:
    """Return the arguments of a command as Markdown, without the keys of the configuration."""
    formatter = argparse.HelpFormatter(parser.prog)
    rows = ["| argument | description |", "|---|---|"]
    actions = [a for a in parser._actions if a.help != argparse.SUPPRESS]
    takes_keys = any("--text.variant" in a.option_strings for a in actions)
    for action in actions:
        if takes_keys and any(option[2:] in settings() for option in action.option_strings):
            continue
        words = " ".join([*action.option_strings, *([] if action.nargs == 0 else [_metavar(action)])])
        text = " ".join(formatter._expand_help(action).split()) if action.help else ""
        cells = (cell.replace("|", "\\|") for cell in (f"`{words}`", text))
        rows.append(f"| {' | '.join(cells)} |")
    if takes_keys:
        rows.append(
            "| `--KEY VALUE` | every key of [the configuration](configuration.md), as `--steps 1000` |"
        )
    return "\n".join(rows)


def _metavar(action: argparse.Action) -> str:
    if action.metavar:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper() if action.option_strings else action.dest


if __name__ == "__main__":
    result(reference().rstrip())
