"""The installed command: beside files of the user with the names of our folders, and from a wheel."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHADOWED = 'raise RuntimeError("a file of the user was imported")\n'


def run(*command, path, cwd):
    return subprocess.run(
        [sys.executable, "-m", "lit_fast", *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("command", [(), ("train",), ("embed",), ("plan",)])
def test_command_beside_files_named_train_and_embed_imports_ours(tmp_path, command):
    for name in ("train.py", "embed/__init__.py", "configs/__init__.py", "tests/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(SHADOWED)
    done = run(*command, "--help", path=(".", ROOT), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage: lit-fast" in done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the wheel of the tracked files."""
    pytest.importorskip("setuptools")
    tmp_path = tmp_path_factory.mktemp("wheel")
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    if not tracked[0]:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked):
        if (ROOT / name).exists() and not name.startswith(("tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "-w", tmp_path, source,
        ],
        check=True,
        timeout=300,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


def test_wheel_has_one_top_level_module_and_the_recipes(wheel, tmp_path):
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"lit_fast"}
    recipes = {path.name for path in (ROOT / "configs").glob("*.toml")}
    assert {path.name for path in (installed / "lit_fast/configs").iterdir()} == recipes
    shown = run("train", "siglit_b8_one_day", "--help", path=(installed,), cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "siglit_b8_one_day" in shown.stdout
    done = run("train", "siglit_b8_one_day", "--workdir", "w", path=(installed,), cwd=tmp_path)
    assert done.returncode == 2
    assert "no dataset is given; add --dataset D" in done.stderr


def test_wheel_in_an_environment_of_its_own_runs_a_whole_job(wheel, tmp_path):
    """Run without the tree; the dependencies are those of this environment, `.ci/package` installs them too."""
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin/python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel],
        check=True,
    )
    env = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib"), "XLA_FLAGS": ""}
    job = tmp_path / "job"
    job.mkdir()
    for command in (
        [environment / "bin/lit-fast", "--help"],
        [python, "-P", ROOT / "tests/e2e/installed.py"],
    ):
        done = subprocess.run(command, env=env, cwd=job, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert (job / "run/receipt.json").exists()
