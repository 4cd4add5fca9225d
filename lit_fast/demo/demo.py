"""Run all commands, from `index` to `eval`, on drawn pictures.

Training scenes, and held-out scenes whose combinations of colour and shape occur in no training scene, are written as
tar files; a small vision tower of this package embeds them; a text tower is trained on four simulated devices. Nothing
is downloaded.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from importlib import resources

from lit_fast.errors import UserError, os_reason
from lit_fast.storage.atomic import replacing_directory, write_atomic
from lit_fast.storage.files import exists, local_path
from lit_fast.storage.paths import StrPath, join
from lit_fast.storage.text_files import read_json
from lit_fast.utils.output import result, status

TOWER = str(resources.files(__package__) / "scenes_vit.npz")
CONFIG = str(resources.files(__package__) / "demo.toml")
TRAIN_SCENES, RETRIEVAL_SCENES, ZERO_SHOT_SCENES = 10_000, 1_000, 960

_FOUR_DEVICES = "--xla_force_host_platform_device_count=4"


def run_demo(out: StrPath) -> None:
    """Run all commands below `out` and write `out/index.html`.

    Existing results are kept.

    Raises:
      UserError: `out` cannot be written, or a command failed and printed the reason.
    """
    start = time.monotonic()
    resumed = exists(local_path(out))
    try:
        draw_scenes(join(out, "scenes"))
    except OSError as error:
        raise UserError(
            f"the demo cannot write into {out}: {os_reason(error)}; choose another --out"
        ) from None
    commands = demo_commands(out)
    for command in commands:
        run_command(command)
    seconds = None if resumed else time.monotonic() - start
    page = join(out, "index.html")
    _write_page(out, page, [as_typed(c) for c in commands], seconds)
    duration = "" if seconds is None else f" after {seconds:.0f} s"
    result(f"\ndone{duration}; open {page} in a browser")


def demo_commands(out: StrPath) -> list[list[str]]:
    """Return the arguments of `lit-fast`, in order."""
    train, retrieval, zero_shot, run = (join(out, name) for name in ("train", "retrieval", "zeroshot", "run"))
    scenes = join(out, "scenes")
    # The pictures have the tower's size already; nothing is cropped.
    tower = ["--tower", TOWER, "--preprocess", "tf-squash", "--batch-size", "64"]
    sets = [(train, "train"), (retrieval, "retrieval"), (zero_shot, "zeroshot/test")]
    commands = [["index", join(scenes, source), "--out", dataset] for dataset, source in sets]
    commands += [["embed", dataset, *tower] for dataset, _ in sets]
    vocabulary = ["--train-vocab", "512", "--model-type", "bpe", "--max-length", "32", "--name", "words"]
    commands.append(["tokenize", train, *vocabulary])
    evaluated = ["--evaluate.zero_shot", zero_shot, "--evaluate.retrieval", retrieval]
    commands.append(["train", CONFIG, "--workdir", run, "--dataset", train, *evaluated])
    figures = join(out, "figures.json")
    commands.append(["eval", run, "--zero-shot", zero_shot, "--retrieval", retrieval, "--json", figures])
    return commands


def as_typed(command: list[str]) -> str:
    """Return a command as typed, with paths relative to the current directory."""
    simulated = f"XLA_FLAGS={_FOUR_DEVICES} " if command[0] == "train" else ""
    here = join(os.getcwd(), "")
    return f"{simulated}lit-fast {shlex.join(argument.removeprefix(here) for argument in command)}"


def run_command(command: list[str]) -> None:
    """Print one command and run it in its own process.

    Raises:
      UserError: it failed.
    """
    status(f"\n$ {as_typed(command)}")
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    if command[0] == "train":
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {_FOUR_DEVICES}".strip()
    process = subprocess.Popen([sys.executable, "-m", "lit_fast", *command], env=env)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the command received it too and saves its work
        process.wait()
        raise
    except SystemExit:
        process.terminate()
        process.wait()
        raise
    if code:
        raise UserError(
            f"the demo stopped because `lit-fast {command[0]}` ended with status {code}; fix the cause above, then "
            "rerun the same command"
        )


def draw_scenes(scenes: str) -> None:
    """Draw the three sets of scenes; a set that exists is complete."""
    from lit_fast.demo.scenes import KNOWN, NOVEL
    from lit_fast.demo.tars import write_captioned, write_classification

    for name, write, count, seed, pairs in (
        ("train", write_captioned, TRAIN_SCENES, 0, KNOWN),
        ("retrieval", write_captioned, RETRIEVAL_SCENES, 1, NOVEL),
        ("zeroshot", write_classification, ZERO_SHOT_SCENES, 2, NOVEL),
    ):
        directory = join(scenes, name)
        if not exists(directory):
            status(f"drawing scenes into {directory}")
            with replacing_directory(directory) as temporary:
                write(temporary, count, seed, pairs)


def _write_page(out: StrPath, page: str, commands: list[str], seconds: float | None) -> None:
    import jax

    from lit_fast.demo.page import build_page, confusions, gallery
    from lit_fast.runs.metrics import read_metrics
    from lit_fast.runs.run import open_run

    jax.config.update("jax_platforms", "cpu")  # as in `run_command`
    run = open_run(join(out, "run"))
    right, wrong = gallery(run, join(out, "retrieval"))
    text = build_page(
        read_metrics(join(out, "run", "metrics.jsonl")),
        read_json(join(out, "figures.json")),
        right,
        wrong,
        confusions(run, join(out, "zeroshot")),
        commands,
        seconds,
    )
    write_atomic(page, text.encode("utf-8", "replace"))
