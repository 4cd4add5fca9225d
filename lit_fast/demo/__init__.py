"""The demo: the whole way, with the real commands, on pictures that it draws itself.

Training scenes, and held-out scenes whose combinations of colour and shape occur in no training scene,
are written as tars; a small vision tower that comes with the package embeds them; a text tower is trained
on four simulated devices. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lit_fast.errors import UserError

TOWER = Path(__file__).with_name("scenes_vit.npz")
CONFIG = Path(__file__).with_name("demo.toml")
TRAIN_SCENES, RETRIEVAL_SCENES, ZERO_SHOT_SCENES = 10_000, 1_000, 960

_FOUR_DEVICES = "--xla_force_host_platform_device_count=4"


def run_demo(out: Path) -> None:
    """Run everything under `out` and write `out/index.html`; what is there already is not done again.

    Raises:
      UserError: `out` cannot be written or a command failed, which has said why.
    """
    began = time.monotonic()
    fresh = not out.exists()
    try:
        _write_scenes(out / "scenes")
    except OSError as error:
        raise UserError(f"the demo cannot write into {out}: {error.strerror}; choose another --out") from None
    commands = _commands(out)
    for command in commands:
        _run(command)
    page = out / "index.html"
    _write_page(out, page, [_shown(c) for c in commands], began if fresh else None)
    took = f" after {time.monotonic() - began:.0f} s" if fresh else ""
    print(f"\ndone{took}; open {page} in a browser")


def _commands(out: Path) -> list[list[str]]:
    """Arguments of `lit-fast`, in order."""
    train, retrieval, zero_shot, run = (str(out / n) for n in ("train", "retrieval", "zeroshot", "run"))
    scenes = out / "scenes"
    # The pictures have the tower's size already: nothing is to be cropped.
    tower = ["--tower", str(TOWER), "--preprocess", "tf-squash", "--batch-size", "64"]
    sets = [(train, "train"), (retrieval, "retrieval"), (zero_shot, "zeroshot/test")]
    commands = [["index", str(scenes / source), "--out", dataset] for dataset, source in sets]
    commands += [["embed", dataset, *tower] for dataset, _ in sets]
    vocabulary = ["--train-vocab", "512", "--model-type", "bpe", "--max-length", "32", "--name", "words"]
    commands.append(["tokenize", train, *vocabulary])
    watched = ["--evaluate.zero_shot", zero_shot, "--evaluate.retrieval", retrieval]
    commands.append(["train", str(CONFIG), "--workdir", run, "--dataset", train, *watched])
    figures = str(out / "figures.json")
    commands.append(["eval", run, "--zero-shot", zero_shot, "--retrieval", retrieval, "--json", figures])
    return commands


def _shown(command: list[str]) -> str:
    """A command as one would type it."""
    simulated = f"XLA_FLAGS={_FOUR_DEVICES} " if command[0] == "train" else ""
    return f"{simulated}lit-fast {shlex.join(_short(a) for a in command)}"


def _short(argument: str) -> str:
    try:
        return str(Path(argument).relative_to(Path.cwd())) if argument.startswith("/") else argument
    except ValueError:
        return argument


def _run(command: list[str]) -> None:
    """Show and run one command in a process of its own."""
    print(f"\n$ {_shown(command)}", flush=True)
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    if command[0] == "train":
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {_FOUR_DEVICES}".strip()
    process = subprocess.Popen([sys.executable, "-m", "lit_fast", *command], env=env)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # which the command was sent as well: it is saving its work
        process.wait()
        raise
    except SystemExit:
        process.terminate()
        process.wait()
        raise
    if status:
        raise UserError(
            f"the demo stopped because `lit-fast {command[0]}` ended with status {status}; once what it says "
            "above is mended, the same demo goes on from there"
        )


def _write_scenes(scenes: Path) -> None:
    """Draw the three sets of scenes; one that is there is whole."""
    from lit_fast.demo.scenes import KNOWN, NOVEL
    from lit_fast.demo.tars import write_captioned, write_classification

    writers: dict[str, Callable[[Path], None]] = {
        "train": lambda path: write_captioned(path, TRAIN_SCENES, 0, KNOWN),
        "retrieval": lambda path: write_captioned(path, RETRIEVAL_SCENES, 1, NOVEL),
        "zeroshot": lambda path: write_classification(path, ZERO_SHOT_SCENES, 2, NOVEL),
    }
    for name, write in writers.items():
        if (scenes / name).exists():
            continue
        print(f"drawing scenes into {scenes / name}", flush=True)
        unfinished = scenes / f".{name}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        write(unfinished)
        unfinished.rename(scenes / name)


def _write_page(out: Path, page: Path, commands: list[str], began: float | None) -> None:
    from lit_fast.demo.page import build_page
    from lit_fast.demo.results import confusion, gallery
    from lit_fast.runs.run import open_run
    from lit_fast.storage.files import read_json, write_atomic

    run = open_run(out / "run")
    right, wrong = gallery(run, out / "retrieval")
    named = confusion(run, out / "zeroshot")
    metrics = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = None if began is None else time.monotonic() - began
    text = build_page(metrics, read_json(out / "figures.json"), right, wrong, named, commands, seconds)
    write_atomic(page, text.encode())
