"""`lit-fast race`: runs of several towers and seeds, a ranking with the noise of the seeds, resumed as it is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from lit_fast.data.dataset import open_dataset
from lit_fast.errors import UserError
from lit_fast.report.compare import read_record
from lit_fast.report.race import Standing, table_of
from lit_fast.train import cli
from tests.helpers import samples, tiny_vit_arrays, write_tar
from tests.trained import CONFIG, command


@pytest.fixture(scope="module")
def data(tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with features of two towers."""
    path = tmp_path_factory.mktemp("race")
    np.savez(path / "wide.npz", **tiny_vit_arrays(width=48, heads=3))
    write_tar(path / "pairs.tar", samples(24))
    (path / "c.toml").write_text(CONFIG.replace("steps = 4", "steps = 2"))
    command("index", path / "pairs.tar", "--out", path / "d")
    command("embed", path / "d", "--tower", tiny_vit)
    command("embed", path / "d", "--tower", path / "wide.npz")
    command("tokenize", path / "d", "--train-vocab", 284, "--max-length", 12)
    return path / "d"


def race(data: Path, out: Path, *more: object) -> None:
    parser = argparse.ArgumentParser()
    run = cli.race(parser)
    words = [data.parent / "c.toml", "--workdir", out, "--dataset", data, "--evaluate.retrieval", data, *more]
    args, args.unknown = parser.parse_known_args([str(word) for word in words])
    run(args)


def test_race_ranks_towers_and_keeps_finished_runs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figures = tmp_path / "w", tmp_path / "r.json"
    race(data, out, "--towers", "tiny,wide", "--seeds", 2, "--json", figures)
    text = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["race.html", "tiny-0", "tiny-1", "wide-0", "wide-1"]
    value = json.loads(figures.read_text())
    by = value["by"]
    means = [np.mean(tower["figures"][by]) for tower in value["towers"]]
    assert means == sorted(means, reverse=True)
    for tower in value["towers"]:
        for run, figure in zip(tower["runs"], tower["figures"][by], strict=True):
            assert read_record(run).final[by] == figure
    assert "±" in text
    assert "standard error of the seeds" in text
    page = (out / "race.html").read_text()
    assert "Ranking" in page
    assert text.splitlines()[-1].startswith(f"{value['towers'][0]['tower']} leads ")
    assert f"<p>{text.splitlines()[-1]}.</p>" in page

    before = {p: p.stat().st_mtime_ns for p in out.rglob("receipt.json")}
    race(data, out, "--towers", "tiny,wide", "--seeds", 2, "--by", "text_retrieval_recall@5")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("receipt.json")} == before
    assert "text_retrieval_recall@5, %" in capsys.readouterr().out
    with pytest.raises(UserError, match="--by 'speed' is not a figure of the runs; choose from"):
        race(data, out, "--towers", "tiny", "--seeds", 1, "--by", "speed")


def test_table_of_one_evaluation_set_names_it_once() -> None:
    figures = {"d/acc1": [0.25, 0.35], "d/acc5": [0.5, 0.5]}
    standings = [Standing("small", (), figures), Standing("tiny", (), figures)]
    assert table_of(standings, "d/acc5") == [
        ["on d", "small", "tiny"],
        ["acc5, %", "50.0 ± 0.0", "50.0 ± 0.0"],
        ["by seed", "50.0 50.0", "50.0 50.0"],
        ["acc1, %", "30.0 ± 7.1", "30.0 ± 7.1"],
    ]
    several = figures | {"e/acc1": [0.1, 0.1]}
    names = [row[0] for row in table_of([Standing("tiny", (), several)], "d/acc1")]
    assert names == ["", "d/acc1, %", "by seed", "d/acc5, %", "e/acc1, %"]


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ("tiny,none", "has no features 'none', only tiny, wide; make them"),
        ("tiny,tiny", "names a tower twice"),
    ],
)
def test_race_of_other_towers_is_refused(towers: str, message: str, data: Path, tmp_path: Path) -> None:
    assert open_dataset(data).rows == 24
    with pytest.raises(UserError, match=message):
        race(data, tmp_path / "w", "--towers", towers)
    assert not (tmp_path / "w").exists()
