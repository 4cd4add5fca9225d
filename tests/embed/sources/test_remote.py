"""Sources at http://, s3://, gs:// and hf://, from real servers on localhost."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import open_features
from lit_fast.data.images.reader import ImageReader
from lit_fast.data.images.sources import check_sources
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.expand import expand
from lit_fast.errors import UserError
from lit_fast.storage import remote
from tests.helpers import encoded, picture, samples, write_tar
from tests.web import FileServer, Hub, file_server, running_hub  # noqa: F401


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two tars and a parquet file with the same kind of rows."""
    root = tmp_path / "files"
    write_tar(root / "00000.tar", samples(12))
    write_tar(root / "00001.tar", samples(12, first=12))
    images = [{"bytes": encoded(picture(i)), "path": f"{i}.jpg"} for i in range(24, 40)]
    table = pa.table({"image": images, "caption": [f"picture {i}" for i in range(24, 40)]})
    pq.write_table(table, root / "rest.parquet", row_group_size=5)
    return root


@pytest.fixture
def server(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with file_server(files) as server:
        yield server


def contents(dataset: Dataset) -> dict[tuple[str, ...], bytes]:
    """Captions -> image file of every row, through the reader."""
    reader = ImageReader(dataset)
    rows = [captions for block in dataset.iter_captions() for captions in block]
    return {tuple(captions): reader.read(row) for row, captions in enumerate(rows)}


def test_index_over_http_equals_local(
    files: Path, server: FileServer, tmp_path: Path, tiny_vit: Path
) -> None:
    """Rows, images and features, with tars and parquet, from URLs in braces."""
    names = ["{00000..00001}.tar", "rest.parquet"]
    local = index_dataset([f"{files}/{n}" for n in names], tmp_path / "local", seed=0)
    away = index_dataset([f"{server.url}/{n}" for n in names], tmp_path / "away", seed=0)
    assert away.rows == 40
    assert contents(away) == contents(local)
    assert all(source.etag for source in away.sources)
    for dataset in (local, away):
        embed_dataset(dataset.path, str(tiny_vit), batch_size=8, workers=4)
    one, two = (open_features(d).read_all().astype(np.float32) for d in (local, away))
    np.testing.assert_array_equal(one, two)


def test_http_transient_failures_are_retried(server: FileServer, tmp_path: Path) -> None:
    url = f"{server.url}/00000.tar"
    remote.stat(url)
    server.statuses = [503, 500, 429]
    dataset = index_dataset([url], tmp_path / "d", seed=0)
    assert dataset.rows == 12
    assert server.statuses == []
    server.cuts = 3
    assert ImageReader(dataset).read(0)
    assert server.cuts == 0
    server.statuses = [503] * remote.ATTEMPTS["http"]
    with pytest.raises(UserError, match=r"00000.tar cannot be read after several attempts: 503"):
        ImageReader(dataset).read(0)


def test_index_over_http_refusals_are_one_line(
    server: FileServer, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, url: str = server.url) -> str:
        assert main(["index", f"{url}/{name}", "--out", str(tmp_path / "d")]) == 2
        assert not (tmp_path / "d").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    assert "no.tar does not exist" in refused("no.tar")
    assert "cannot be listed over http; name the files" in refused("data/")
    assert "after several attempts" in refused(
        "x.tar", "http://127.0.0.1:9"
    )  # nobody listens to the discard port
    server.ranges = False
    assert "cannot be read by ranges: its server ignores them; download it first" in refused("00000.tar")
    server.forbidden = True
    assert "may not be read (403" in refused("00000.tar")


def test_check_sources_finds_a_changed_or_missing_object(
    server: FileServer, files: Path, tmp_path: Path
) -> None:
    dataset = index_dataset([f"{server.url}/00000.tar"], tmp_path / "d", seed=0)
    check_sources(dataset)
    data = (files / "00000.tar").read_bytes()
    (files / "00000.tar").write_bytes(data[:-1] + b"x")  # as long as before
    with pytest.raises(UserError, match="its ETag changed"):
        check_sources(dataset)
    (files / "00000.tar").write_bytes(data[:1000])
    with pytest.raises(UserError, match="has 1000 bytes, but had"):
        check_sources(dataset)
    [block] = dataset.iter_blocks()
    last = int(np.argmax(block.offsets))
    with pytest.raises(UserError, match=r"00000\.tar"):
        ImageReader(dataset).read(last)
    (files / "00000.tar").unlink()
    with pytest.raises(UserError, match="does not exist"):
        check_sources(dataset)


def test_index_a_table_of_image_urls_reads_each_image(
    server: FileServer, files: Path, tmp_path: Path
) -> None:
    """Each image is a file of its own; a missing one is found out when it is embedded."""
    (files / "images").mkdir()
    for i in range(3):
        (files / "images" / f"{i} ä.jpg").write_bytes(encoded(picture(i)))
    lines = "".join(f"{i} ä.jpg\tpicture {i}\n" for i in range(4)) + "../00000.tar\tout\n"
    (files / "t.tsv").write_text("filepath\ttitle\n" + lines)
    assert (
        main(
            ["index", f"{server.url}/t.tsv", "--images", f"{server.url}/images", "--out", str(tmp_path / "d")]
        )
        == 0
    )
    dataset = open_dataset(tmp_path / "d")
    assert dataset.left_out == {f"path outside {server.url}/images": 1}
    [block] = dataset.iter_blocks()
    reader = ImageReader(dataset)
    for row, key in enumerate(block.keys):
        if key == "3 ä.jpg":
            with pytest.raises(ValueError, match="image file not found"):
                reader.read(row)
        else:
            assert reader.read(row) == encoded(picture(int(key[0])))


def assert_equals_local(url: str, files: Path, tmp_path: Path, tower: Path) -> None:
    """Files at `url` give the same rows and features as on the local disk."""
    local = index_dataset([f"{files}/*.tar", f"{files}/rest.parquet"], tmp_path / "local", seed=0)
    away = index_dataset([f"{url}/*.tar", f"{url}/rest.parquet"], tmp_path / "away", seed=0)
    assert contents(away) == contents(local)
    assert all(source.etag for source in away.sources)
    for dataset in (local, away):
        embed_dataset(dataset.path, str(tower), batch_size=8, workers=4)
    one, two = (open_features(d).read_all().astype(np.float32) for d in (local, away))
    np.testing.assert_array_equal(one, two)
    with pytest.raises(UserError, match=r"nothing\.tar does not exist"):
        index_dataset([f"{url}/nothing.tar"], tmp_path / "no", seed=0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server with an empty bucket `pairs`."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setattr(remote, "PAUSE", 0.01)
        remote._open_filesystem("s3").mkdir("pairs")
        yield "s3://pairs"
    server.stop()


def test_index_over_s3_equals_local(files: Path, s3: str, tmp_path: Path, tiny_vit: Path) -> None:
    for file in files.iterdir():
        remote._open_filesystem("s3").put(str(file), f"pairs/a/{file.name}")
    for junk in ("._00000.tar", "__MACOSX/00003.tar"):
        remote._open_filesystem("s3").pipe(f"pairs/a/{junk}", b"junk")
    remote._open_filesystem("s3").pipe("pairs/a/../../etc/00002.tar", (files / "00000.tar").read_bytes())
    assert_equals_local(f"{s3}/a", files, tmp_path, tiny_vit)
    found = expand([f"{s3}/a/**/*.tar"])
    assert [file for file in found if "etc" not in file] == [f"{s3}/a/0000{i}.tar" for i in (0, 1)]
    with pytest.raises(UserError, match=r"b/\*.tar .* matches no file"):
        index_dataset([f"{s3}/b/*.tar"], tmp_path / "no", seed=0)
    with pytest.raises(UserError, match=r"holds \.parquet and \.tar files; name those"):
        index_dataset([f"{s3}/a/"], tmp_path / "no", seed=0)


def test_index_an_object_named_like_a_path_escape_writes_nothing_outside(
    files: Path, s3: str, tmp_path: Path
) -> None:
    remote._open_filesystem("s3").pipe("pairs/e/../../up.tar", (files / "00000.tar").read_bytes())
    before = sorted(os.listdir(tmp_path))
    try:
        dataset = index_dataset([f"{s3}/e/../../up.tar"], tmp_path / "d", seed=0)
    except UserError:
        dataset = None
    assert dataset is None or dataset.rows == 12
    assert sorted({*os.listdir(tmp_path)} - {"d"}) == before


@pytest.fixture(scope="module")
def gs() -> Iterator[str]:
    """The address of a GCS server with an empty bucket `pairs`."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="pairs")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setattr(remote, "PAUSE", 0.01)
        yield "gs://pairs"
    server.stop()


def test_index_over_gs_equals_local(files: Path, gs: str, tmp_path: Path, tiny_vit: Path) -> None:
    for file in files.iterdir():
        url = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/pairs/o?uploadType=media&name=a/{file.name}"
        urllib.request.urlopen(urllib.request.Request(url, file.read_bytes(), method="POST")).close()
    assert_equals_local(f"{gs}/a", files, tmp_path, tiny_vit)


def test_index_without_the_package_of_a_protocol_fails_in_one_line(tmp_path: Path) -> None:
    script = "import sys; sys.modules['s3fs'] = None; from lit_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = ["index", "s3://x/y.tar", "--out", str(tmp_path / "d")]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("needs more packages; run: pip install 'lit-fast[remote]'\n")
    assert done.stderr.count("\n") == 1


def test_image_reader_in_many_threads_reads_ranges(server: FileServer, files: Path, tmp_path: Path) -> None:
    dataset = index_dataset([f"{server.url}/00000.tar", f"{server.url}/rest.parquet"], tmp_path / "d", seed=0)
    want, reader = contents(dataset), ImageReader(dataset)
    rows = [tuple(c) for block in dataset.iter_captions() for c in block]
    server.requests.clear()
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(reader.read, [*range(dataset.rows)] * 2))
    assert got == [want[captions] for captions in rows] * 2
    # One request per image and time from the tar; each of the four row groups is read once, in one request
    # for the footer and one for the column (8 MiB are read ahead).
    assert server.downloads <= 2 * 12 + 4 * 2


def test_index_over_hf_equals_local(files: Path, hub: Hub, tmp_path: Path, tiny_vit: Path) -> None:
    hub.add(
        "datasets/owner/pairs", {f"data/{n}": d for n, d in contents_of(files).items()} | {"README.md": b"#"}
    )
    url = "hf://datasets/owner/pairs"
    assert_equals_local(f"{url}/data", files, tmp_path, tiny_vit)
    nested = index_dataset(
        [f"{url}/**/0000?.tar", f"{url}@main/data/rest.parquet"], tmp_path / "nested", seed=0
    )
    assert nested.rows == 40
    with pytest.raises(UserError, match=r"b/\*.tar .* matches no file"):
        index_dataset([f"{url}/b/*.tar"], tmp_path / "no", seed=0)


def test_check_sources_finds_a_changed_file_of_the_hub(files: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets/owner/pairs", files)
    dataset = index_dataset(["hf://datasets/owner/pairs/00000.tar"], tmp_path / "d", seed=0)
    check_sources(dataset)
    data = hub.repositories["datasets/owner/pairs"]["00000.tar"]
    hub.repositories["datasets/owner/pairs"]["00000.tar"] = data[:-1] + b"x"
    with pytest.raises(UserError, match="its ETag changed"):
        check_sources(dataset)


def test_index_a_gated_dataset_needs_a_token(
    files: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("datasets/owner/pairs", files)
    hub.gated.add("datasets/owner/pairs")
    url = "hf://datasets/owner/pairs/00000.tar"
    with pytest.raises(
        UserError, match=rf"is gated; accept its licence at {hub.url}/datasets/owner/pairs and run"
    ):
        index_dataset([url], tmp_path / "d", seed=0)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert index_dataset([url], tmp_path / "d", seed=0).rows == 12


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "datasets/owner/absent/a.tar",
            "does not exist or is private .*; check the name, or run: hf auth login",
        ),
        ("datasets/owner/pairs@v9/a.tar", "has no such revision"),
        ("datasets/owner/pairs/data", "is a directory; name the files in it or give a pattern"),
        ("buckets/owner/pairs/a.tar", "is in a bucket of the Hub|does not exist or is private"),
        ("datasets/owner", "cannot be read"),
    ],
)
def test_index_an_absent_file_of_the_hub_fails_in_one_line(
    files: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, message: str
) -> None:
    hub.add("datasets/owner/pairs", {f"data/{n}": d for n, d in contents_of(files).items()})
    assert main(["index", f"hf://{url}", "--out", str(tmp_path / "d")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1, error


def contents_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
