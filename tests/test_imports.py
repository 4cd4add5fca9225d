"""Which module may import which, and where files, arguments and the terminal are handled."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import modules of lower layers and of its own entry. An entry is a module or a package below `lit_fast`.
GROUND_FLOOR = (
    ("version", "errors", "models.sizes"),
    ("utils",),
    ("runtime", "config"),
    ("storage", "losses", "config_check"),
    ("data", "config_io"),
    ("models", "evaluation"),
    ("weights", "runs"),
    ("towers",),
    ("report",),
    ("inference",),
    ("demo",),
    ("cli",),
    ("api",),
)
EMBED = (
    ("embed.locks",),
    ("embed.sources", "embed.journal", "embed.tokenize"),
    ("embed.pipeline", "embed.shard_writer", "embed.skipped", "embed.class_names"),
    ("embed.row_reader", "embed.commits"),
    ("embed.job",),
    ("embed.index", "embed.extract", "embed.relocate"),
    ("embed.verify", "embed.importers"),
    ("embed.share",),
    ("embed.cli",),
)
TRAIN = (
    (
        "train.optimizer",
        "train.evaluator",
        "train.input_pipeline",
        "train.text_pass",
        "train.sizes",
        "train.image_start",
    ),
    ("train.image_pass",),
    ("train.step", "train.workdir"),
    ("train.export", "train.cost", "train.inputs", "train.attention"),
    ("train.tracking", "train.plan"),
    ("train.mirror",),
    ("train.checkpoints", "train.step_builder"),
    ("train.loop",),
    ("train.race",),
    ("train.cli",),
)


@cache
def modules() -> dict[str, Path]:
    """All product modules by their import names."""
    found = {}
    for top, package in (("lit_fast", "lit_fast"), ("embed", "lit_fast.embed"), ("train", "lit_fast.train")):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            if top == "lit_fast" and parts[0] in ("embed", "train"):  # the links to the stages
                continue
            name = ".".join((package, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, also inside functions; `from a import b` gives `a.b`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path, known: dict[str, Path]) -> set[str]:
    """Which of the known modules a file imports."""
    names = set()
    for name in imported(path):
        if name not in known:
            name = name.rpartition(".")[0]
        if name in known:
            names.add(name)
    return names


@cache
def graph() -> dict[str, set[str]]:
    return {name: imported_modules(path, modules()) - {name} for name, path in modules().items()}


def entry(name: str, layers: tuple[tuple[str, ...], ...]) -> tuple[int, str] | None:
    """Number of the layer of a module and its entry there; the longest entry wins."""
    name = name.removeprefix("lit_fast.")
    found = [
        (len(e), i, e)
        for i, layer in enumerate(layers)
        for e in layer
        if name == e or name.startswith(f"{e}.")
    ]
    return max(found)[1:] if found else None


def test_ground_floor_imports_no_stage():
    stages = ("lit_fast.embed.", "lit_fast.train.")
    wrong = [
        f"{name} -> {other}"
        for name, others in graph().items()
        if not f"{name}.".startswith(stages)
        for other in others
        if f"{other}.".startswith(stages)
    ]
    assert not wrong


def test_stages_do_not_import_each_other():
    wrong = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if (f"{name}.".startswith("lit_fast.embed.") and f"{other}.".startswith("lit_fast.train."))
        or (f"{name}.".startswith("lit_fast.train.") and f"{other}.".startswith("lit_fast.embed."))
    ]
    assert not wrong


def test_product_imports_neither_tests_nor_benchmarks():
    wrong = [
        f"{name} -> {other}"
        for name, path in modules().items()
        for other in imported(path)
        if other.split(".")[0] in ("tests", "benchmarks", "embed", "train")
    ]
    assert not wrong


@pytest.mark.parametrize("layers", [GROUND_FLOOR, EMBED, TRAIN], ids=["ground floor", "embed", "train"])
def test_layers_import_downwards_only(layers):
    first = layers[0][0].partition(".")[0]
    stage = f"lit_fast.{first}." if layers is not GROUND_FLOOR else ""
    wrong = []
    for name, others in graph().items():
        inside = (
            name.startswith(stage)
            if stage
            else not f"{name}.".startswith(("lit_fast.embed.", "lit_fast.train."))
        )
        if not inside or name in ("lit_fast", "lit_fast.__main__") or name.endswith(".__main__"):
            continue
        here = entry(name, layers)
        assert here, f"{name} has no layer; give it one here"
        for other in others:
            there = entry(other, layers)
            if there and here[1] != there[1] and here[0] <= there[0]:
                wrong.append(f"{name} -> {other}")
    assert not wrong


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = set()
            while name not in component:
                component.add(stack.pop())
            if len(component) > 1:
                found.append(component)

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_no_circle_of_imports():
    assert not circles(graph())


def test_no_circle_of_imports_in_benchmarks():
    known = {f"benchmarks.{path.stem}": path for path in (ROOT / "benchmarks").glob("*.py")}
    found = circles({name: imported_modules(path, known) - {name} for name, path in known.items()})
    assert not found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]


def test_argparse_is_imported_by_command_modules_only():
    wrong = [
        name
        for name, path in modules().items()
        if "argparse" in imported(path) and "cli" not in name.split(".") and not name.endswith("__main__")
    ]
    assert not wrong


def test_nothing_private_of_a_dependency_is_imported():
    wrong = [
        f"{name} -> {other}"
        for name, path in modules().items()
        for other in imported(path)
        if not other.startswith("lit_fast") and other != "__future__.annotations"
        if any(part.startswith("_") for part in other.split("."))
    ]
    assert not wrong


def test_nothing_private_of_another_module_is_imported():
    wrong = [
        f"{name} -> {other}"
        for name, path in modules().items()
        for other in imported(path)
        if other.startswith("lit_fast") and other.rpartition(".")[2].startswith("_")
        if other.rpartition(".")[2] != "__version__"
    ]
    assert not wrong


def calls(path: Path) -> Iterator[str]:
    """Dotted names of the functions that a file calls."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_print_is_called_in_one_module():
    wrong = [name for name, path in modules().items() if "print" in calls(path)]
    assert wrong == ["lit_fast.utils.output"]


FILE_MODULES = {"pathlib", "fcntl", "glob", "tempfile", "shutil"}
FILE_CALLS = {
    "open", "io.open", "os.open", "os.replace", "os.rename", "os.link", "os.unlink", "os.remove", "os.rmdir", "os.stat",
    "os.lstat", "os.listdir", "os.scandir", "os.walk", "os.makedirs", "os.mkdir", "os.fsync", "os.path.exists",
    "os.path.isfile", "os.path.isdir", "os.path.getsize", "os.path.getmtime",
}  # fmt: skip


def test_files_are_accessed_through_storage_only():
    wrong = set()
    for name, path in modules().items():
        if name.startswith("lit_fast.storage."):
            continue
        used = FILE_MODULES & {other.split(".")[0] for other in imported(path)}
        if used == {"shutil"} and not {c for c in calls(path) if c.startswith("shutil.")} - {
            "shutil.get_terminal_size"
        }:
            used = set()
        wrong |= {name} if used or FILE_CALLS & set(calls(path)) else set()
    assert not wrong


def test_locks_of_the_file_system_are_not_used():
    """Some file systems have none, and some pretend."""
    wrong = [name for name, path in modules().items() if {"fcntl", "filelock"} & set(imported(path))]
    assert not wrong


@pytest.mark.parametrize("module", ["embed.index", "embed.tokenize", "data.features", "report.info"])
def test_commands_on_local_files_load_no_client_of_buckets(module):
    """Nor JAX."""
    program = f"import sys, lit_fast.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    clients = {"tensorstore", "fsspec", "gcsfs", "s3fs", "jax"}
    assert not clients & set(done.stdout.split())


def test_help_imports_no_command_and_no_jax():
    code = (
        "import sys; from lit_fast.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('jax', 'numpy') or m.startswith('lit_fast.')), "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(ast.literal_eval(done.stderr.splitlines()[-1]))
    assert not {m for m in loaded if m.split(".")[0] in ("jax", "numpy")}
    commands = {m for m in loaded if m.startswith(("lit_fast.embed", "lit_fast.train", "lit_fast.cli."))}
    assert commands == {"lit_fast.cli.main"}
