"""The command `info` on datasets and runs, whole and damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_fast.cli.main import main
from lit_fast.config import Config
from lit_fast.config_io import to_toml
from lit_fast.data.dataset import SHARD, Dataset, Source
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.features import Features, Manifest
from lit_fast.errors import UserError
from lit_fast.report.info import format_info, gather
from lit_fast.storage.text_files import write_json

PROVENANCE: dict[str, Any] = {
    "name": "tiny",
    "source": "/weights/tiny model.npz",
    "identity": "0123456789abcdef",
    "width": 32,
    "dtype": "float32",
    "gelu": "exact",
    "options": {"preprocess": "pil-crop", "resolution": 32, "gelu": "exact"},
    "preprocess": {"method": "pil-crop", "size": 32, "resize": 35},
}


def make_dataset(path: Path, rows: int = 5) -> Dataset:
    """Rows with two captions each, the first row without any, in two sources."""
    sources = []
    for name, size in (("a.tar", 1000), ("b.tar", 2500)):
        (path.parent / name).write_bytes(bytes(size))
        sources.append(Source(str(path.parent / name), size))
    writer = DatasetWriter(path)
    for i in range(rows):
        writer.add(Row(f"k{i}", i % 2, 0, 1, ("one", "two") if i else (), label=i % 3))
    return writer.finish(
        seed=4, sources=sources, classnames=["x", "y", "z"], templates=["{c}"], left_out={"no image": 2}
    )


def add_features(data: Dataset, shards: list[int], *, tower: str = PROVENANCE["identity"]) -> Features:
    """The metadata of features whose `shards` are finished; row 1 is invalid."""
    write_json(Path(data.path) / "features" / "mine" / "tower.json", PROVENANCE)
    features = Features(data, "mine", PROVENANCE)
    for shard in shards:
        rows = min(SHARD, data.rows - shard * SHARD)
        invalid = {1: "cut off"} if shard == 0 else {}
        features.write_manifest(Manifest(shard, shard * SHARD, rows, data.shard_keys[shard], tower, invalid))
    return features


def add_tokens(data: Dataset, **changes: Any) -> None:
    """The metadata of tokens."""
    meta = {
        "identity": "fedcba9876543210", "vocab_size": 32000, "max_length": 16, "pad_id": 1, "captions": data.captions,
        "ids": 10 * data.captions, "truncated": 2, "shard_keys": list(data.shard_keys),
    }  # fmt: skip
    write_json(Path(data.path) / "tokens" / "bpe" / "tokens.json", meta | changes)


def test_info_of_new_dataset_lists_next_commands(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "my data")
    value = gather(data.path)
    assert value["kind"] == "dataset"
    assert (value["rows"], value["captions"], value["captionless"], value["labelled"]) == (5, 8, 1, 5)
    assert value["captions_per_row"] == 8 / 5
    assert (value["classes"], value["templates"], value["left_out"]) == (3, 1, {"no image": 2})
    assert value["sources"] == {"count": 2, "bytes": 3500, "elsewhere": [], "missing": [], "changed": []}
    assert value["features"] == value["tokens"] == value["problems"] == []
    assert [item["command"] for item in value["todo"]] == [
        f"lit-fast embed '{data.path}' --tower FILE.npz",
        f"lit-fast tokenize '{data.path}' --tokenizer FILE.model",
    ]
    text = format_info(value)
    for part in (
        "5, shards 1, order by seed 4",
        "8, 1.6 per row; rows without: 1",
        "rows 5, class names 3, templates 1",
        "files 2, 3.5 kB; all present",
        "2: no image 2",
    ):
        assert part in text


def test_info_of_complete_dataset_has_no_todo(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d")
    features = add_features(data, [0])
    add_tokens(data)
    value = gather(data.path)
    assert value["todo"] == value["problems"] == []
    (found,) = value["features"]
    assert (found["name"], found["shards"], found["finished"]) == ("mine", 1, 1)
    assert (found["valid"], found["invalid"], found["reasons"]) == (4, 1, {"cut off": 1})
    assert found["bytes"] == sum(p.stat().st_size for p in Path(features.path).rglob("*") if p.is_file())
    (tokens,) = value["tokens"]
    assert (tokens["name"], tokens["mean_length"], tokens["truncated"]) == ("bpe", 10, 2)
    text = format_info(value)
    assert "mine: 1 of 1 shards, 4 valid and 1 invalid rows (cut off 1)" in text
    assert "width 32, computed in float32, pil-crop 32 px" in text
    assert "bpe: 32,000 pieces, 10.0 tokens per caption, at most 16 (25.0 % are cut)" in text
    assert len(text.splitlines()) < 24


def test_info_of_missing_shards_gives_the_command(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d", rows=2 * SHARD + 3)
    add_features(data, [0, 2])
    add_tokens(data)
    value = gather(data.path)
    assert (value["features"][0]["finished"], value["features"][0]["valid"]) == (2, SHARD + 3 - 1)
    assert value["todo"] == [
        {
            "what": "features mine, 1 of 3 shards",
            "command": f"lit-fast embed {data.path} --tower '/weights/tiny model.npz' --name mine "
            "--preprocess pil-crop --resolution 32 --gelu exact --dtype float32",
        }
    ]


def test_info_gives_a_command_that_embed_accepts(tmp_path: Path) -> None:
    import argparse
    import shlex

    from lit_fast.embed.cli import embed

    data = make_dataset(tmp_path / "d")
    add_features(data, [])
    parser = argparse.ArgumentParser()
    embed(parser)
    words = shlex.split(gather(data.path)["todo"][0]["command"])
    args = parser.parse_args(words[2:])
    assert (str(args.dataset), args.tower, args.name) == (data.path, PROVENANCE["source"], "mine")
    assert (args.resolution, args.preprocess, args.gelu, args.dtype) == (32, "pil-crop", "exact", "float32")


def test_info_of_missing_or_changed_sources_reports_problems(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d")
    (tmp_path / "a.tar").unlink()
    (tmp_path / "b.tar").write_bytes(b"short")
    value = gather(data.path)
    assert value["sources"]["missing"] == [str(tmp_path / "a.tar")]
    assert value["sources"]["changed"] == [str(tmp_path / "b.tar")]
    assert f"1 of 2 sources missing: {tmp_path}/a.tar" in format_info(value)


def test_info_of_damaged_parts_shows_the_rest(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d")
    add_features(data, [0], tower="another")
    add_tokens(data, shard_keys=["other rows"])
    problems = gather(data.path)["problems"]
    assert any("manifest/00000.json belongs to other rows or another tower" in p for p in problems)
    assert any("tokens/bpe was made from other rows" in p for p in problems)

    (Path(data.path) / "features" / "mine" / "manifest" / "00000.json").write_text("{")
    write_json(Path(data.path) / "tokens" / "bpe" / "tokens.json", {"shard_keys": list(data.shard_keys)})
    value = gather(data.path)
    assert value["rows"] == 5
    assert any("00000.json is damaged: not JSON" in p for p in value["problems"])
    assert any("bpe/tokens.json is damaged: identity is missing" in p for p in value["problems"])


# --- runs


def make_run(path: Path, checkpoints: list[int], metrics: str, steps: int = 100) -> Path:
    """Write the files of a training run, without weights."""
    path.mkdir()
    (path / "config.toml").write_text(to_toml(Config(dataset=str(path.parent), steps=steps)))
    write_json(path / "tower.json", PROVENANCE)
    write_json(path / "tokens.json", {"identity": "fedcba98", "vocab_size": 1000, "max_length": 16})
    for step in checkpoints:
        (path / "checkpoints" / str(step)).mkdir(parents=True)
    (path / "checkpoints" / "60.orbax-checkpoint-tmp-1").mkdir(parents=True)
    (path / "metrics.jsonl").write_text(metrics)
    return path


LINES = [
    {"step": 10, "loss": 5.0, "pairs_per_second": 12.5},
    {"step": 20, "dev/acc1": 0.25, "dev/acc5": 0.5},
    {"step": 30, "loss": 3.25, "bias": -9.5},
    {"step": 40, "dev/acc1": 0.375},
]
WHOLE = "".join(json.dumps(line) + "\n" for line in LINES)


def test_info_of_unfinished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "w", [20, 30], WHOLE)
    value = gather(run)
    assert (value["kind"], value["step"], value["steps"], value["finished"]) == ("run", 40, 100, False)
    assert value["checkpoints"] == [20, 30]
    assert value["metrics"] == LINES[2]
    assert value["evaluations"] == [
        {"step": 20, "figures": {"dev/acc1": 0.25, "dev/acc5": 0.5}},
        {"step": 40, "figures": {"dev/acc1": 0.375}},
    ]
    command = f"lit-fast train {run}/config.toml --workdir {run}"
    assert value["todo"] == [{"what": "steps after 30", "command": command}]
    assert value["problems"] == []
    memory = {"keep": "hidden", "parts": 4, "bytes": 2.1e9, "limit_bytes": 8e9, "bytes_by": "compiler"}
    write_json(run / "receipt.json", {"memory": memory})
    text = format_info(gather(run))
    for part in (
        "keeps hidden, parts 4; 2.1 GB a device of 8.0 GB, by compiler",
        "40 of 100, not finished",
        "20, 30",
        "at step 30: loss 3.25",
        "at step 40 (of 2)",
        "dev/acc1  37.5 %",
    ):
        assert part in text


@pytest.mark.parametrize("cut", range(1, 45, 4))
def test_info_ignores_a_torn_last_line(tmp_path: Path, cut: int) -> None:
    torn = json.dumps({"step": 99, "loss": 1.0, "dev/acc1": 0.99}).encode() + "…".encode()
    run = make_run(tmp_path / "w", [30], "")
    (run / "metrics.jsonl").write_bytes(WHOLE.encode() + torn[:cut])
    assert gather(run)["step"] == 40
    (run / "metrics.jsonl").write_bytes(torn[:cut])
    assert gather(run)["step"] == 30


def test_info_of_finished_and_of_new_run(tmp_path: Path) -> None:
    value = gather(make_run(tmp_path / "done", [100], WHOLE))
    assert value["finished"]
    assert value["todo"] == []
    assert "100 of 100, finished" in format_info(value)
    value = gather(make_run(tmp_path / "new", [], ""))
    assert (value["step"], value["metrics"], value["evaluations"]) == (0, None, [])
    assert "checkpoints  none" in format_info(value)


def test_info_of_incomplete_run_reports_problems(tmp_path: Path) -> None:
    run = make_run(tmp_path / "w", [30], WHOLE)
    (run / "tower.json").unlink()
    (run / "tokens.json").write_text("{}")
    (run / "config.toml").write_text('dataset = "/no/such"\nsteps = 5\n')
    problems = "\n".join(gather(run)["problems"])
    for part in ("tower.json does not exist", "tokens.json is damaged", "dataset /no/such does not exist"):
        assert part in problems
    (run / "config.toml").write_text("steps = ")
    with pytest.raises(UserError, match=r"config\.toml is not TOML"):
        gather(run)


# --- the command


def test_info_command_prints_text_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "d")
    out = tmp_path / "info.json"
    assert main(["info", str(data.path), "--json", str(out)]) == 0
    value = json.loads(out.read_text())
    assert value == gather(data.path)
    assert capsys.readouterr().out == format_info(value) + "\n"

    for path, message in ((tmp_path / "no", "does not exist"), (tmp_path, "neither a dataset")):
        assert main(["info", str(path)]) == 2
        assert message in capsys.readouterr().err
