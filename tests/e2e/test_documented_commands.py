"""The commands in the blocks of README and docs/ are run, in their order, on small inputs under the names they use.

Those that cannot run in a test are named in `NOT_RUN`, with the reason and the test that runs the like.
"""

import json
import re
import shlex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from lit_fast import api
from lit_fast.cli.main import main
from lit_fast.demo.scenes import NOVEL
from lit_fast.demo.tars import write_classification
from tests.cli.test_documented_commands import ROOT, commands, words_of
from tests.helpers import encoded, picture, samples, write_tar

PAGES = [ROOT / "README.md"] + [
    ROOT / f"docs/{name}.md"
    for name in (
        "quickstart", "data", "evaluation", "using_models", "training", "import_features", "towers", "sharing",
        "planning", "recipes/one_day", "recipes/tpu_v4_8",
    )
]  # fmt: skip
NOT_RUN = {
    r"lit-fast plan ": "compiles for minutes; tests/train/plan",
    r"--push |lit-fast (push|pull) |elsewhere:": "an account of the Hub; tests/embed/share",
    r"hf:|timm:|open_clip:|--arch |--tower \./weights/|hf://": "downloads weights or data; tests/towers",
    r"[gs]s?3?://|/data/": "a bucket, or a host with TPUs; tests/e2e/test_bucket_locations.py",
    r"lit-fast race ": "six trainings; tests/train/test_race.py",
    r"lit-fast serve ": "runs until it is stopped; tests/inference/test_serve.py",
    r"--format open_clip": "no tower of open_clip; tests/train/export/test_open_clip.py",
    r"captions.jsonl --images ": "Crossmodal-3600; tests/embed/sources",
    r"--image.train unlocked": "tests/e2e/test_unlocked.py",
    r"spiece.model|--tokenizer siglip": "a published tokenizer; tests/embed/test_tokenize.py",
    r"data/cc12m": "the result of a pull; tests/embed/share",
}
SMALLER = [
    (r"augreg/[\w-]+", "tiny.npz"),
    (r"\{00000\.\.\d+\}", "{00000..00001}"),
    (r"--train-vocab \d+", "--train-vocab 284"),
    (r"SOURCE\.\.\.", "pairs/00000.tar"),
    (r"wds:imagenetv2", "wds_imagenetv2/test"),
    (r" --steps \d+| --evaluate.every_steps \d+", ""),
]
STEPS = "--steps 2 --text.variant mu --text.depth 1 --stream.global_batch 32 --optimizer.warmup_steps 1"


def documented(path):
    return [re.sub(r"\s+# .*", "", command) for command in commands(path, inline=False)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_vit):
    """A directory with small inputs by the names of the pages, and the datasets that they take for granted."""
    folder = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        (folder / "tiny.npz").symlink_to(tiny_vit)
        for name in (
            "pairs/00000",
            "pairs/00001",
            "dev/00000",
            "flickr8k/train/00000",
            "flickr8k/train/00001",
        ):
            write_tar(folder / f"{name}.tar", samples(20, first=20 * int(name[-1])))
        write_tar(folder / "flickr8k/dev/00000.tar", samples(12))
        (folder / "results").mkdir()
        (folder / "photos").mkdir()
        for number in range(40):
            (folder / f"photos/{number}.jpg").write_bytes(encoded(picture(number)))
            (folder / f"photos/{number}.txt").write_text(f"photo {number} of a wide green field")
        write_classification("wds_imagenetv2", 32, 0, NOVEL)
        write_classification("wds_pets", 48, 1, NOVEL)
        for name, source in (
            ("imagenet", "wds_imagenetv2/test"), ("pets-train", "wds_imagenetv2/test"), ("pets", "wds_pets/test"),
            ("coco", "dev/00000.tar"),
        ):  # fmt: skip
            api.index(source, out=f"data/{name}")
            api.embed(f"data/{name}", tower="tiny.npz")
        write_features(folder)
        yield folder


def write_features(folder):
    """Write features of other programs, with captions."""
    features = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    texts = [f"row {number}" for number in range(24)]
    np.save(folder / "features.npy", features)
    (folder / "captions.csv").write_text("caption\n" + "".join(f"{text}\n" for text in texts))
    (folder / "captions.jsonl").write_text("".join(json.dumps({"caption": text}) + "\n" for text in texts))
    (folder / "parts").mkdir()
    save_file({"features": features}, folder / "parts/0.safetensors")
    (folder / "table").mkdir()
    pq.write_table(pa.table({"embedding": list(features), "title": texts}), folder / "table/0.parquet")
    for name in ("clip_output", "clip_retrieval_output"):
        for part in ("img_emb", "metadata"):
            (folder / name / part).mkdir(parents=True)
        np.save(folder / name / "img_emb/img_emb_0.npy", features)
        pq.write_table(pa.table({"caption": texts}), folder / name / "metadata/metadata_0.parquet")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_of_the_page_run(path, folder, capsys):
    for program in re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
        if "projected" in program:  # the rows that later commands of the page train on
            exec(compile(program, str(path), "exec"), {})
    for command in documented(path):
        if any(re.search(pattern, command) for pattern in NOT_RUN):
            continue
        for pattern, replacement in SMALLER:
            command = re.sub(pattern, replacement, command)
        for dataset in ("data/flickr8k", "data/flickr8k-dev") if "$d" in command else ("",):
            words = words_of(command.replace("$d", dataset))[1:]
            status = main(words + (shlex.split(STEPS) if words[0] == "train" else []))
            assert status == 0, (command, capsys.readouterr().err)


def test_python_of_the_pages_runs(folder, tmp_path, monkeypatch, capsys):
    """The functions of python_api.md, then the model of using_models.md that they trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("tiny.npz", "pairs", "data/coco"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "cat.jpg").write_bytes(encoded(picture(3)))
    small = '"steps": 2, "text.variant": "mu", "text.depth": 1, "stream.global_batch": 32, "optimizer.warmup_steps": 1'
    names: dict = {}
    for page, smaller in (
        ("python_api", {"augreg/B_8": "tiny.npz", "32000": "284", '"steps": 1000': small}),
        ("using_models", {'"b8"': '"runs/b8"'}),
    ):
        program = (ROOT / f"docs/{page}.md").read_text().partition("```python\n")[2].partition("```")[0]
        for value, replacement in smaller.items():
            assert value in program
            program = program.replace(value, replacement)
        exec(compile(program, page, "exec"), names)
    assert names["results"][0]["task"] == "zeroshot_retrieval"
    assert (names["images"].shape, names["texts"].shape) == ((1, 32), (2, 32))
    assert "[[" in capsys.readouterr().out


def test_reasons_not_to_run_a_command_apply_to_some_command():
    found = [command for path in PAGES for command in documented(path)]
    assert not [pattern for pattern in NOT_RUN if not any(re.search(pattern, command) for command in found)]


def test_all_pages_with_commands_are_here():
    pages = {path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if documented(path)}
    assert pages == set(PAGES)
