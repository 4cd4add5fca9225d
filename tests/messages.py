"""Every message that the product shows to its users, read from its source: `python -m tests.messages` lists them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PRODUCT = [ROOT / folder for folder in ("lit_fast", "embed", "train")]
# Functions whose first argument is a text for the user, and the kind of that text.
OUTPUTS = {"status": "status", "result": "result", "failure": "status", "write_status": "status"}
# Other exceptions whose text becomes a part of an error's line.
REASONS = {"ValueError", "TypeError", "RuntimeError", "ArgumentTypeError"}


class Message(NamedTuple):
    """A text in the source; a field of an f-string is `{its code}`."""

    where: str  # file:line
    kind: str  # error, reason, status, result, help
    text: str


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Paths below the repository and their syntax trees."""
    for folder in PRODUCT:
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(ROOT)
            if name.parts[1] not in ("embed", "train") or name.parts[0] != "lit_fast":  # links to the stages
                yield str(name), ast.parse(path.read_text())


def error_classes(trees: list[ast.Module]) -> set[str]:
    """Names of UserError and of all classes derived from it."""
    found = {"UserError"}
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while True:
        more = {c.name for c in classes if {ast.unparse(b) for b in c.bases} & found} - found
        if not more:
            return found
        found |= more


def texts(node: ast.expr) -> list[str]:
    """All texts that an expression can have; what is no text in the source becomes `{code}`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                found = [a + b for a in found for b in texts(part.value)]
            else:
                found = [a + b for a in found for b in texts(part)]
        return found
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _is_text(node):
        return [a + b for a in texts(node.left) for b in texts(node.right)]
    return [f"{{{ast.unparse(node)}}}"]


def _is_text(node: ast.expr) -> bool:
    return any(
        isinstance(n, ast.JoinedStr) or isinstance(getattr(n, "value", None), str) for n in ast.walk(node)
    )


def messages() -> Iterator[Message]:
    """All messages, in the order of the files."""
    parsed = list(sources())
    errors = error_classes([tree for _, tree in parsed])
    for name, tree in parsed:
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func).rpartition(".")[2]
            shown: list[tuple[str, ast.expr]] = []
            if function in errors:
                shown += [("error", a) for a in node.args[:1]]
            elif function in REASONS:
                shown += [("reason", a) for a in node.args[:1]]
            elif function in OUTPUTS and isinstance(node.func, ast.Name):
                shown += [(OUTPUTS[function], a) for a in node.args[:1]]
            elif function == "setting":
                shown += [("help", a) for a in node.args[1:2]]
            shown += [
                ("help", k.value)
                for k in node.keywords
                if k.arg in ("help", "description", "epilog", "metavar")
            ]
            for kind, argument in shown:
                for text in texts(argument):
                    yield Message(f"{name}:{node.lineno}", kind, text)


if __name__ == "__main__":
    for message in messages():
        if not sys.argv[1:] or message.kind in sys.argv[1:]:
            print(f"{message.where}\t{message.kind}\t{message.text}")
