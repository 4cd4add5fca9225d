"""The release script in a repository of its own, whose tests, package and PyPI are stubs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lit_fast.version import __version__

ROOT = Path(__file__).parents[1]
# `python3 -m venv D` makes a D/bin/python that records how it is called.
PYTHON = """#!/usr/bin/env bash
mkdir -p "$3/bin"
printf '#!/usr/bin/env bash\\necho "$@" >>calls\\n' >"$3/bin/python"
chmod +x "$3/bin/python"
"""


@pytest.fixture
def repository(tmp_path):
    """A repository that is ready for a release."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    repository = tmp_path / "repository"
    for name in ("lit_fast/version.py", "CITATION.cff", "CHANGELOG.md", ".ci/release", ".gitignore"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repository / name)
    changelog = repository / "CHANGELOG.md"
    heading = rf"^## \[{re.escape(__version__)}\] - .*$"
    assert re.search(heading, changelog.read_text(), re.MULTILINE)
    changelog.write_text(
        re.sub(heading, f"## [{__version__}] - 2026-12-01", changelog.read_text(), flags=re.MULTILINE)
    )
    for name in ("run", "package"):
        (repository / ".ci" / name).write_text(f"#!/usr/bin/env bash\necho {name} >>calls\n")
        (repository / ".ci" / name).chmod(0o755)
    (repository / ".gitignore").write_text("calls\nbuild/\nstubs/\n")
    (repository / "stubs").mkdir()
    (repository / "stubs/python3").write_text(PYTHON)
    (repository / "stubs/python3").chmod(0o755)
    git(repository, "init", "--quiet")
    git(repository, "add", "--all")
    git(repository, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "all")
    return repository


def git(repository, *words):
    return subprocess.run(["git", *words], cwd=repository, check=True, capture_output=True, text=True).stdout


def release(repository, answer=""):
    """Return exit status, the last line of stderr, and the calls of the stubs."""
    env = os.environ | {"PATH": f"{repository / 'stubs'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [repository / ".ci/release"],
        cwd=repository,
        env=env,
        input=f"{answer}\n",
        capture_output=True,
        text=True,
    )
    calls = repository / "calls"
    called = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, done.stderr.strip().rpartition("\n")[2], called


def test_release_with_the_version_as_answer_uploads_and_tags(repository):
    status, line, calls = release(repository, __version__)
    assert status == 0, line
    assert [call.partition(" --quiet")[0] for call in calls] == [
        "run", "package", "-m pip install", "-m twine upload dist/*",
    ]  # fmt: skip
    assert git(repository, "tag") == f"v{__version__}\n"


@pytest.mark.parametrize("answer", ["", "y", "9.9"])
def test_release_with_another_answer_uploads_nothing(repository, answer):
    assert release(repository, answer) == (1, "release: nothing was uploaded", ["run", "package"])
    assert git(repository, "tag") == ""


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda r: (r / "new").write_text(""), "files are not committed"),
        (lambda r: git(r, "tag", f"v{__version__}"), f"the tag v{__version__} exists"),
    ],
)
def test_release_that_is_not_ready_is_refused_before_the_tests(repository, change, line):
    change(repository)
    status, printed, calls = release(repository, __version__)
    assert (status, calls) == (1, [])
    assert line in printed


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CITATION.cff"])
def test_release_of_another_version_than_a_file_says_is_refused(repository, name):
    path = repository / name
    path.write_text(path.read_text().replace(__version__, "9.9.9"))
    git(repository, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--all", "-m", "other")
    status, printed, calls = release(repository, __version__)
    assert (status, calls) == (1, [])
    assert name in printed
