"""Every `lit-fast` command of the README, the pages of docs/ and the recipes of configs/ can be parsed."""

import argparse
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from lit_fast.config import settings

ROOT = Path(__file__).parents[2]
ENTRY_POINTS = {e.name: e for e in entry_points(group="lit_fast.commands")}
FILES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/*.toml")])
FILES = [path for path in FILES if path.name != "commands.md"]  # generated of the parsers themselves
_BEFORE = r"^(?:\$ |srun \S+ |bash on_vm\.sh run \w+ )?|; do |&& "


def commands(path, inline=True):
    """Return the commands of a file, without the shell before them; those within sentences last."""
    text, within = path.read_text(), []
    if path.suffix == ".md":
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        blocks = [block for language, block in fenced if language in ("", "sh")]
        within = re.findall(r"`(lit-fast [^\s`]+\s[^`]+)`", text) if inline else []
        text = "\n".join(blocks)
    else:
        text = re.sub(r"^# *", "", text, flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    for line in [line for line in lines if line.startswith("gcloud ")]:  # a command for another machine
        lines += [w.partition("=")[2] for w in shlex.split(line) if w.startswith("--command=")]
    found = re.findall(rf"(?:{_BEFORE})(lit-fast .*)", "\n".join(lines), re.MULTILINE)
    return [*found, *(" ".join(command.split()) for command in within)]


def words_of(command):
    """Return the words up to the end of the command."""
    lexer = shlex.shlex(command.replace(" ... ", " "), posix=True, punctuation_chars=";|&)(")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = []
    for word in lexer:
        if set(word) <= set(";|&()"):
            break
        words.append(word)
    return words


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_of_the_documents_are_accepted(path):
    problems = []
    for command in commands(path):
        try:
            name, *words = words_of(command)[1:]
            parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
            parser.error = lambda message: (_ for _ in ()).throw(ValueError(message))
            ENTRY_POINTS[name].load()(parser)
            args, rest = parser.parse_known_args(words)
            keys = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
            unknown = set(keys) - set(settings() if getattr(args, "takes_overrides", False) else ())
            if unknown or (rest and not keys):
                problems.append(f"{command}: {rest}")
        except SystemExit:  # --help
            continue
        except (ValueError, KeyError, argparse.ArgumentError) as error:
            problems.append(f"{command}: {error}")
    assert not problems, "\n".join(problems)


def test_commands_are_found_where_they_are():
    assert len(commands(ROOT / "README.md")) >= 6
    assert sum(len(commands(path)) for path in ROOT.glob("docs/**/*.md")) > 40
    assert len(commands(ROOT / "docs/recipes/tpu_v4_8.md")) > 6
    assert all(commands(path) for path in ROOT.glob("configs/*.toml"))
