"""Output never fails for want of a character, a reader or a stream."""

import os
import subprocess
import sys

import pytest

START = (
    "from lit_fast.storage.machine import open_standard_descriptors\n"
    "from lit_fast.utils.output import *\n"
    "open_standard_descriptors(); prepare_streams()\n"
)


def run(code, *, redirect="", **environment):
    command = f'"{sys.executable}" -c "$CODE" {redirect}'
    env = os.environ | {"CODE": START + code} | environment
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_output_in_any_encoding_shows_every_character(encoding):
    done = run("for show in (status, result): show('\\u72ac \\udce9 a')", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert "\\udce9 a" in done.stdout
    assert "\\udce9 a" in done.stderr
    assert ("\\u72ac" in done.stdout) == (encoding != "utf-8")


@pytest.mark.parametrize("show", ["status", "result"])
def test_output_without_a_reader_ends_quietly_with_the_status_of_sigpipe(show):
    code = (
        "import time; from contextlib import suppress; time.sleep(0.1)\n"
        f"with suppress(Exception):\n    for i in range(99): {show}('x')\n"
        "print('not reached', file=open('/dev/stderr', 'w'))"
    )
    done = run(code, redirect="2>&1 | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


def test_output_to_closed_streams_is_dropped_and_reaches_no_file(tmp_path):
    code = "file = open('f', 'w'); result('r'); status('s'); file.write('own'); file.flush(); flush()"
    done = run(f"import os; os.chdir({str(tmp_path)!r})\n{code}", redirect="<&- >&- 2>&-")
    assert done.returncode == 0
    assert (tmp_path / "f").read_text() == "own"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_result_that_cannot_be_written_is_an_error_and_status_is_not():
    code = (
        "status('s')\ntry: result('r')\nexcept Exception as error: print(error, file=open('/dev/fd/9', 'w'))"
    )
    done = run(code, redirect=">/dev/full 2>/dev/full 9>&1")
    assert done.returncode == 0
    done = run(code.replace("/dev/fd/9", "/dev/stderr"), redirect=">/dev/full")
    assert done.stderr == "s\nstdout cannot be written: No space left on device; redirect it elsewhere\n"
