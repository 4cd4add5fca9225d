"""The scripts of configs/cloud without a cloud: style, printed commands, and loops over a program named gcloud."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLOUD = ROOT / "configs/cloud"
SCRIPTS = sorted([*CLOUD.glob("*.sh"), *CLOUD.glob("*.sbatch")])
PAGE = ROOT / "docs/recipes/tpu_v4_8.md"
DRY_RUNS = [
    ("tpu.sh", "run"), ("embed.sbatch",), ("train.sbatch",),
]  # fmt: skip

# A slice in a directory: files `resource` and `node` with its states, `home` of its only worker.
GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
cd "$SLICE"
echo "$3 $4" >>calls
for word; do
  case $word in
    --command=*) command=${word#--command=} ;;
  esac
done
case "$3 $4" in
  "queued-resources create") echo ACTIVE >resource; echo READY >node; mkdir home ;;
  "queued-resources delete") rm -r resource node home ;;
  "queued-resources describe") cat resource 2>/dev/null || { echo "ERROR: NOT_FOUND" >&2; exit 1; } ;;
  "tpu-vm describe") cat node 2>/dev/null || { echo "ERROR: NOT_FOUND" >&2; exit 1; } ;;
  "tpu-vm scp") cp "$OLDPWD/$5" "$OLDPWD/$6" home ;;
  "tpu-vm ssh")
    status=0
    (cd home; HOME=$PWD bash -c "$command") || status=$?
    [[ -e node && $(<node) == READY ]] || exit 255
    exit "$status"
    ;;
esac
"""
UV = """#!/usr/bin/env bash
set -euo pipefail
mkdir -p "$HOME/lit-fast/bin"
cp "$STUBS/lit-fast" "$HOME/lit-fast/bin"
"""
WHEEL = """#!/usr/bin/env bash
mkdir -p build/wheels
touch build/wheels/lit_fast-0-py3-none-any.whl
"""


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Return a function that puts a program into the path."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("STUBS", str(folder))

    def add(name, text):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    return add


def test_scripts_pass_shellcheck():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = run(program, *SCRIPTS, *(ROOT / ".ci" / name for name in ("run", "package", "release")))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_stops_at_errors_and_has_one_block_of_configuration(script):
    text = script.read_text()
    assert "\nset -euo pipefail\n" in text
    assert script.name == "on_vm.sh" or text.count("# --- Configuration") == 1


@pytest.mark.parametrize("command", DRY_RUNS, ids=lambda command: command[0])
def test_dry_run_prints_the_commands_of_the_page(command):
    name, *rest = command
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = run("bash", CLOUD / name, "--dry-run", *rest, env=variables)
    assert done.returncode == 0, done.stderr
    assert f"\n```\n{done.stdout}```\n" in PAGE.read_text()


def test_commands_of_the_page_are_commands_of_gcloud(tmp_path):
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    done = run(
        "gcloud", "meta", "lint-gcloud-commands", f"--commands-text-file={PAGE}",
        env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert len(found) > 10
    assert not [f"{each['command_string']}: {each['error_message']}" for each in found if not each["success"]]


@pytest.fixture
def cloud(tmp_path, monkeypatch, stubs):
    """Return the directory of a slice, and a function that runs tpu.sh on it."""
    shutil.copytree(CLOUD, tmp_path / "checkout/configs/cloud")
    slice_directory = tmp_path / "slice"
    slice_directory.mkdir()
    for name, value in {"SLICE": str(slice_directory), "POLL_SECONDS": "0"}.items():
        monkeypatch.setenv(name, value)
    for name, text in {"gcloud": GCLOUD, "uv": UV, "python3": WHEEL}.items():
        stubs(name, text)
    return slice_directory, lambda: run("bash", "configs/cloud/tpu.sh", "run", cwd=tmp_path / "checkout")


def test_run_makes_a_preempted_slice_again_and_repeats_the_command(cloud, stubs):
    slice_directory, run_all = cloud
    stubs(
        "lit-fast",
        """#!/usr/bin/env bash
echo "$*" >>"$SLICE/commands"
if [[ $1 == train && $(grep -c '^train' "$SLICE/commands") -lt 3 ]]; then
  echo SUSPENDED >"$SLICE/resource"
  echo PREEMPTED >"$SLICE/node"
  exit 143
fi
""",
    )
    done = run_all()
    assert done.returncode == 0, done.stderr
    commands = [line.split()[0] for line in (slice_directory / "commands").read_text().splitlines()]
    assert [c for c in commands if c != "--version"] == [
        "index", "embed", "tokenize", "train", "train", "train",
    ]  # fmt: skip
    calls = (slice_directory / "calls").read_text().splitlines()
    assert calls.count("queued-resources create") == calls.count("queued-resources delete") == 3
    assert not (slice_directory / "resource").exists()


def test_run_ends_when_a_stage_fails_on_a_slice_that_is_there(cloud, stubs):
    slice_directory, run_all = cloud
    stubs(
        "lit-fast",
        '#!/usr/bin/env bash\n[[ $1 == embed ]] && { echo "lit-fast: error: no tower"; exit 2; }\nexit 0\n',
    )
    done = run_all()
    assert done.returncode == 1
    assert "lit-fast: error: no tower" in done.stdout
    assert "stage embed failed 3 times; fix the cause and rerun the same command" in done.stderr
    assert (slice_directory / "calls").read_text().count("queued-resources create") == 1


def test_stage_continues_without_its_connection_and_is_found_again(tmp_path, stubs):
    (tmp_path / "home/lit-fast/bin").mkdir(parents=True)
    stubs(
        "job",
        '#!/usr/bin/env bash\necho start >>"$HOME/starts"\necho first line\n'
        'until [[ -e "$HOME/go" ]]; do sleep 0.02; done\necho last line\nexit 7\n',
    )
    command = ["bash", CLOUD / "on_vm.sh", "run", "train", "job"]
    variables = os.environ | {"HOME": str(tmp_path / "home")}
    null = subprocess.DEVNULL
    first = subprocess.Popen(command, env=variables, stdout=null, stderr=null, start_new_session=True)
    while not (tmp_path / "home/starts").exists():
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)  # the processes of the connection
    first.wait(timeout=10)
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as second:
        assert second.stdout.readline() == "first line\n"
        (tmp_path / "home/go").touch()
        assert second.wait(timeout=60) == 7
        assert "last line" in second.stdout.read()
    assert (tmp_path / "home/starts").read_text() == "start\n"


@pytest.mark.parametrize("script", ["embed.sbatch", "train.sbatch"])
@pytest.mark.parametrize("signalled", [False, True])
def test_batch_script_requeues_itself_after_the_signal_before_the_end_of_its_time(
    script, signalled, tmp_path, stubs, monkeypatch
):
    stubs(
        "srun",
        '#!/usr/bin/env bash\ntrap "exit 143" TERM\necho $$ >"$STUBS/pid.new"\nmv "$STUBS/pid.new" "$STUBS/pid"\n'
        "for i in {1..100}; do sleep 0.1; done\n"
        if signalled
        else "#!/usr/bin/env bash\nexit 0\n",
    )
    stubs(
        "scancel", '#!/usr/bin/env bash\n[[ "$*" == "--signal=TERM 12" ]] && kill -TERM "$(<"$STUBS/pid")"\n'
    )
    stubs("scontrol", '#!/usr/bin/env bash\necho "$*" >"$STUBS/requeued"\n')
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    job = subprocess.Popen(["bash", CLOUD / script])
    folder = tmp_path / "stubs"
    if signalled:
        while not (folder / "pid").exists():
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == (143 if signalled else 0)
    requeued = folder / "requeued"
    assert requeued.exists() == signalled
    assert not signalled or requeued.read_text() == "requeue 12\n"


def test_dockerfile_copies_what_the_package_needs_and_runs_as_a_user():
    text = (CLOUD / "Dockerfile").read_text().replace("\\\n", " ")
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "lit_fast", "embed", "train", "configs"} <= set(copied)
    (extras,) = re.findall(r"/source\[(.*?)\]", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert text.index("\nRUN ") < text.index("\nUSER lit\n") < text.index("\nENTRYPOINT ")
