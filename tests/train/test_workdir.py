"""One training at a time in a run directory."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from lit_fast.config import Config, ImageConfig, TextConfig
from lit_fast.config_io import to_toml
from lit_fast.errors import UserError
from lit_fast.models.precision import fast_dtype
from lit_fast.runtime import make_mesh
from lit_fast.storage.text_files import write_json
from lit_fast.train.workdir import check_workdir, choose_dtype, lock_workdir, recorded_in_memory


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


def test_choose_dtype_of_a_new_run_is_the_faster_one(tmp_path, capsys):
    assert choose_dtype(Config(), tmp_path, make_mesh()).text.dtype == fast_dtype("cpu")
    assert f"text.dtype {fast_dtype('cpu')}" in capsys.readouterr().err


@pytest.mark.parametrize("recorded", ["float32", "bfloat16"])
def test_choose_dtype_on_resume_is_that_of_the_run(tmp_path, recorded):
    config = Config()
    started = replace(config, text=replace(config.text, dtype=recorded))
    (tmp_path / "config.toml").write_text(to_toml(started))
    resumed = choose_dtype(config, tmp_path, make_mesh())
    assert resumed == started
    check_workdir(tmp_path, resumed)

    other = replace(config.text, dtype="bfloat16" if recorded == "float32" else "float32")
    explicit = choose_dtype(replace(config, text=other), tmp_path, make_mesh())
    with pytest.raises(UserError, match=r"text\.dtype is .* there and .* now"):
        check_workdir(tmp_path, explicit)


def test_choose_dtype_gives_a_trained_image_tower_that_of_the_text_tower(tmp_path):
    config = Config(text=TextConfig(dtype="bfloat16"), image=ImageConfig(train="scratch"))
    assert choose_dtype(config, tmp_path, make_mesh()).image.dtype == "bfloat16"
    given = replace(config, image=ImageConfig(train="scratch", dtype="float32"))
    assert choose_dtype(given, tmp_path, make_mesh()) == given
    assert choose_dtype(Config(), tmp_path, make_mesh()).image == ImageConfig()
