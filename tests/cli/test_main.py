"""The command line: spelling of flags, help, exit codes."""

import errno
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from jax.errors import JaxRuntimeError

from lit_fast.cli.main import COMMANDS, main
from lit_fast.config import settings
from lit_fast.errors import MachineError

ENTRY_POINTS = {e.name: e for e in entry_points(group="lit_fast.commands")}


def test_help_lists_every_installed_command(capsys):
    assert set(COMMANDS) == set(ENTRY_POINTS)
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {name}" in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_a_summary_and_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    usage, summary, *_ = capsys.readouterr().out.split("\n\n")
    assert usage.startswith(f"usage: lit-fast {name}")
    assert len(summary.splitlines()[0]) <= 100
    assert f"Example: lit-fast {name} " in ENTRY_POINTS[name].load().__doc__


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_flags_accept_hyphens_and_underscores(flag, capsys):
    assert main(["embed", "D", "--tower", "T", flag, "0"]) == 2
    assert "argument --batch-size: 0 is less than 1" in capsys.readouterr().err


def test_keys_without_a_section_have_no_underscore():
    """A flag without a dot is spelled with hyphens, as the options of a command are."""
    assert not [key for key in settings() if "." not in key and "_" in key]


@pytest.mark.parametrize("flag", ["--loss.bias-init", "--loss.bias_init"])
@pytest.mark.parametrize("value", ["-1e1", "-10", "-.5"])
def test_keys_accept_hyphens_and_negative_numbers(flag, value, tmp_path, capsys):
    options = ("--workdir", str(tmp_path / "w"), flag, value, "--text.mask-padding", "maybe")
    assert main(["train", "flickr8k_cpu", *options]) == 2
    assert "text.mask_padding must be true or false, not 'maybe'" in capsys.readouterr().err


def test_unknown_flags_name_the_nearest_key(tmp_path, capsys):
    assert main(["train", "flickr8k_cpu", "--workdir", str(tmp_path), "--learning-rate", "1"]) == 2
    assert (
        "unknown config key 'learning_rate' on the command line; did you mean optimizer.learning_rate?"
        in (capsys.readouterr().err)
    )
    assert main(["info", str(tmp_path), "--nope"]) == 2
    assert "unrecognized arguments: --nope; see lit-fast --help" in capsys.readouterr().err


def test_broken_pipe_ends_without_traceback():
    command = f"{sys.executable} -m lit_fast towers | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141)  # 0 if the reader was slower
    assert not done.stderr


def test_deleted_current_directory_is_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        assert main(["info", "d"]) == 2
    finally:
        os.chdir(tmp_path)
    assert (
        "the current directory cannot be used: No such file or directory; change" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            OSError(errno.EMFILE, "Too many open files", "f"),
            2,
            "f: Too many open files, of which this process may",
        ),
        (OSError(errno.EROFS, "Read-only file system", "f"), 2, "f: Read-only file system"),
        (MemoryError(), 1, "this process is out of memory: it may use"),
        (
            ImportError("libx.so: failed to map segment from shared object"),
            1,
            "this process is out of memory: it may",
        ),
        (MachineError("process 1 is missing"), 1, "process 1 is missing"),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            1,
            "the device is out of",
        ),
    ],
    ids=["files", "read-only", "memory", "libraries", "machine", "device"],
)
def test_failure_of_the_machine_is_a_line_with_its_status(error, status, line, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr("lit_fast.cli.main.run_command", fail)
    assert main(["info", "d"]) == status
    assert capsys.readouterr().err.startswith(f"lit-fast: error: {line}")
