"""Images by row: those of the sources as they were indexed, or None."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, Source, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.images.reader import ImageReader
from tests.helpers import samples, write_tar


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two tars of three rows."""
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", samples(3, 3 * number))
    paths = [str(tmp_path / f"{number}.tar") for number in range(2)]
    assert main(["index", *paths, "--out", str(tmp_path / "d")]) == 0
    return open_dataset(tmp_path / "d")


def test_image_reader_returns_the_files_of_the_rows(dataset: Dataset) -> None:
    files = {name.removesuffix(".jpg"): data for name, data in samples(6) if name.endswith(".jpg")}
    read = ImageReader(dataset).read_or_none
    keys = [key for block in dataset.iter_blocks() for key in block.keys]
    assert [read(row) for row in range(6)] == [files[key] for key in keys]


@pytest.mark.parametrize("what", ["gone", "longer", "folder"])
def test_read_or_none_of_changed_source_is_none(dataset: Dataset, what: str) -> None:
    changed = Path(dataset.sources[1].path)
    if what == "longer":  # other bytes at the offsets of the images
        changed.write_bytes(bytes(1024) + changed.read_bytes())
    else:
        changed.unlink()
    if what == "folder":
        changed.mkdir()
    read = ImageReader(dataset).read_or_none
    found = [read(row) is not None for row in range(6)]
    sources = [source for block in dataset.iter_blocks() for source in block.sources]
    assert found == [source == 0 for source in sources]


def test_read_or_none_without_known_source_is_none(tmp_path: Path) -> None:
    for name, sources in (("none", []), ("unknown", [Source(str(tmp_path / "file"), 3, "later")])):
        (tmp_path / "file").write_bytes(b"abc")
        writer = DatasetWriter(tmp_path / name)
        writer.add(Row("k", 0, 0, 3, ("a caption",)))
        assert ImageReader(writer.finish(seed=0, sources=sources)).read_or_none(0) is None
