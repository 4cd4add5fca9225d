"""Every message that the product shows to its users, read from its source: `python -m tests.messages [KIND...]`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Functions whose first argument is shown, and the kind of that text.
_SHOWN = {"status": "status", "failure": "status", "result": "result"}
# Exceptions whose text becomes a part of an error's line.
_REASONS = {"ValueError", "TypeError", "RuntimeError", "ArgumentTypeError", "ImageError", "Skipped"}


class Message(NamedTuple):
    """A text in the source; a field of an f-string is `{its code}`."""

    where: str  # file:line
    kind: str  # error, problem (of a function that returns errors), reason, status, result, help
    text: str


@cache
def _sources() -> dict[str, ast.Module]:
    paths = [path for top in ("lit_fast", "embed", "train") for path in sorted((ROOT / top).rglob("*.py"))]
    names = {str(path.relative_to(ROOT)): path for path in paths}
    links = ("lit_fast/embed/", "lit_fast/train/")  # to the stages
    return {n: ast.parse(path.read_text()) for n, path in names.items() if not n.startswith(links)}


def _error_classes() -> set[str]:
    """Names of UserError and of all classes derived from it."""
    classes = [n for tree in _sources().values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    found = {"UserError"}
    while more := {c.name for c in classes if {ast.unparse(b) for b in c.bases} & found} - found:
        found |= more
    return found


def _error_functions() -> set[str]:
    """Names of the functions that return a UserError."""
    return {
        node.name
        for tree in _sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) == "UserError"
    }


def texts(node: ast.expr) -> list[str]:
    """Return all texts that an expression can have; everything else than text in it becomes `{code}`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for part in node.values:
            found = [
                a + b
                for a in found
                for b in texts(getattr(part, "value", part) if isinstance(part, ast.FormattedValue) else part)
            ]
        return found
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [texts(node.left), texts(node.right)]
        if any(not text.startswith("{") for part in parts for text in part):
            return [a + b for a in parts[0] for b in parts[1]]
    return [f"{{{ast.unparse(node)}}}"]


def messages() -> Iterator[Message]:
    """Yield all messages in the order of the files."""
    classes, functions = _error_classes(), _error_functions()
    for name, tree in _sources().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func).rpartition(".")[2]
            shown = [("help", k.value) for k in node.keywords if k.arg in ("help", "description", "epilog")]
            if function in classes:
                shown += [("error", argument) for argument in node.args]
            elif function in functions:
                shown += [("problem", argument) for argument in node.args[1:]]
            elif function in _REASONS:
                shown += [("reason", argument) for argument in node.args]
            elif function in _SHOWN and isinstance(node.func, ast.Name):
                shown += [(_SHOWN[function], node.args[0])]
            elif function == "setting":
                shown += [("help", node.args[1])]
            for kind, argument in shown:
                for text in texts(argument):
                    yield Message(f"{name}:{node.lineno}", kind, text)


if __name__ == "__main__":
    for message in messages():
        if message.kind in (sys.argv[1:] or message.kind):
            print(*message, sep="\t")
