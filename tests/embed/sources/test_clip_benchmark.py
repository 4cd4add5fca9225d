"""CLIP_benchmark's evaluation sets: a directory, a URL, and by name from a Hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.expand import expand
from lit_fast.errors import UserError
from lit_fast.evaluation import known_sets
from lit_fast.evaluation.known_sets import resolve_labels
from lit_fast.storage import remote
from tests.helpers import encoded, picture, write_tar
from tests.web import (  # noqa: F401
    COMMIT,
    Answer,
    FileServer,
    Hub,
    Server,
    file_server,
    own_cache,
    running_hub,
    running_server,
)

NAMES, TEMPLATES = "red\ngreen\nblue\n", "a photo of a {c}.\n\n{c}\n"


def benchmark_set(root: Path, tars: int = 2, *, train: bool = True) -> Path:
    """Four photos per tar, labelled 0 to 2."""
    for split in ("train", "test") if train else ("test",):
        for number in range(tars):
            members = []
            for i in range(4 * number, 4 * number + 4):
                members += [(f"s{i:07d}.cls", str(i % 3).encode()), (f"s{i:07d}.jpg", encoded(picture(i)))]
            write_tar(root / split / f"{number}.tar", members)
        (root / split / "nshards.txt").write_text(f"{tars}\n")
    (root / "classnames.txt").write_text(NAMES)
    (root / "zeroshot_classification_templates.txt").write_text(TEMPLATES)
    return root


def check(dataset: Dataset, folder: str) -> None:
    assert sorted(source.path for source in dataset.sources) == [f"{folder}/test/{n}.tar" for n in (0, 1)]
    assert (dataset.rows, dataset.labelled) == (8, 8)
    assert dataset.classnames == ("red", "green", "blue")
    assert dataset.templates == ("a photo of a {c}.", "{c}")


def test_a_directory_stands_for_its_test_split(tmp_path: Path) -> None:
    root = benchmark_set(tmp_path / "wds_colours")
    check(index_dataset([str(root)], tmp_path / "d", seed=0), str(root))
    # A split by itself, and one that has lost a tar.
    assert index_dataset([str(root / "train")], tmp_path / "e", seed=0).rows == 8
    (root / "test" / "1.tar").unlink()
    with pytest.raises(
        UserError, match=r"test/1\.tar is missing, of the 2 tars in \S*nshards\.txt; restore it"
    ):
        expand([str(root)])


@pytest.mark.parametrize("text", ["", "two", "0", "-1", "1e3", "99999999", "2\n2", "²"])
def test_a_count_that_is_none(tmp_path: Path, text: str) -> None:
    root = benchmark_set(tmp_path / "set")
    (root / "test" / "nshards.txt").write_text(text)
    with pytest.raises(UserError, match="which is not a number of tars") as caught:
        expand([str(root)])
    assert "\n" not in str(caught.value)


def test_an_empty_line_among_class_names_keeps_its_number(tmp_path: Path) -> None:
    root = benchmark_set(tmp_path / "set")
    (root / "classnames.txt").write_text("red\n\nblue\n\n")
    assert index_dataset([str(root)], tmp_path / "d", seed=0).classnames == ("red", "", "blue")


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with file_server(benchmark_set(tmp_path / "files" / "wds_colours").parent) as server:
        yield server


def test_a_url_with_a_slash_is_a_directory(web: FileServer, tmp_path: Path) -> None:
    check(index_dataset([f"{web.url}/wds_colours/"], tmp_path / "d", seed=0), f"{web.url}/wds_colours")
    with pytest.raises(UserError, match="cannot be listed over http; name the files"):
        expand([f"{web.url}/nothing/"])


# --- by name


def test_by_name_from_the_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("datasets/clip-benchmark/wds_toy-colours", benchmark_set(tmp_path / "files"))
    folder = tmp_path / "hub" / "datasets--clip-benchmark--wds_toy-colours" / "snapshots" / COMMIT
    check(index_dataset(["wds:toy/colours"], tmp_path / "d", seed=0), str(folder))
    # None is of the training split.
    assert hub.downloads[0].endswith("/resolve/main/test/nshards.txt")
    assert not any("train" in path for path in hub.downloads)
    # A cached set needs no server.
    hub.requests.clear()
    monkeypatch.setenv("LIT_FAST_OFFLINE", "1")
    assert len(expand(["wds:toy/colours"])) == 2
    assert not hub.requests
    capsys.readouterr()
    assert main(["index", "wds:imagenet-a", "--out", str(tmp_path / "e")]) == 2
    error = capsys.readouterr().err
    assert 'is not in the cache and no request may be made (offline); run "hf download' in error
    assert error.count("\n") == 1


def test_a_set_that_is_not_what_it_is_known_to_be(hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets/clip-benchmark/wds_vtab-cifar10", benchmark_set(tmp_path / "files", train=False))
    with pytest.raises(UserError, match=r"wds:vtab/cifar10 has 3 class names in \S*classnames\.txt, not 10"):
        expand(["wds:vtab/cifar10"])


def test_an_unknown_name_lists_the_known(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"does not exist.*; choose from imagenet1k, imagenetv2, .*vtab/pets"):
        expand(["wds:imagenet3"])
    hub.requests.clear()
    for name in ("", "../x", "a/b/c", "/etc", "a b", "a?b"):
        with pytest.raises(UserError, match="is not of the form wds:NAME; choose from imagenet1k"):
            expand([f"wds:{name}"])
    assert not hub.requests


def test_real_labels_come_through_the_cache(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = {"real": {"task": "labels", "url": f"{server.url}/real.json"}}
    monkeypatch.setattr(known_sets, "known_evaluations", lambda: table)
    server.answers["/real.json"] = Answer(b"[[1], [], [2, 3]]")
    path = resolve_labels("real")
    assert Path(path).read_bytes() == b"[[1], [], [2, 3]]"
    server.requests.clear()
    assert resolve_labels("real") == path
    assert not server.requests
    own = tmp_path / "own.json"
    own.write_text("{}")
    assert resolve_labels(str(own)) == str(own)
    with pytest.raises(UserError, match=r"is not a file; give a JSON file or one of the known labels: real"):
        resolve_labels("reel")


def test_the_real_folder(realdata: Path, tmp_path: Path) -> None:
    dataset = index_dataset([str(realdata / "wds_tf_flowers")], tmp_path / "d", seed=0)
    assert (dataset.rows, dataset.labelled, len(dataset.classnames), len(dataset.templates)) == (
        400,
        400,
        5,
        3,
    )
