"""One training at a time in a run directory."""

import os
import re
import subprocess
import sys

import pytest

from lit_fast.errors import UserError
from lit_fast.storage.files import write_json
from lit_fast.train.workdir import lock_workdir, recorded_in_memory


def test_lock_workdir_admits_one_training(tmp_path):
    code = "from lit_fast.train.workdir import lock_workdir; "
    code += f"lock = lock_workdir({str(tmp_path)!r})"
    with lock_workdir(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        message = f"workdir {tmp_path} is being written by `.*` \\(process {os.getpid()} on .*; wait for it or choose"
        assert re.search(message, other.stderr)
        with pytest.raises(UserError, match=message):
            lock_workdir(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True)
    lock_workdir(tmp_path).release()


def test_recorded_in_memory_is_that_of_the_run_or_none(tmp_path):
    assert recorded_in_memory(tmp_path) is None
    write_json(tmp_path / "stream.json", {"identity": "a", "in_memory": False})
    assert recorded_in_memory(tmp_path) is False
    write_json(tmp_path / "stream.json", {"identity": "a", "in_memory": "no"})
    with pytest.raises(UserError, match="is damaged: in_memory is 'no'"):
        recorded_in_memory(tmp_path)
