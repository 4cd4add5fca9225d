"""The image loader: every row once, in order, with the pixels that preprocessing makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lit_fast.data.images.decode import MAX_PIXELS, decode
from lit_fast.embed.index import index_dataset
from lit_fast.towers.loader import ImageLoader, load_batches
from lit_fast.towers.preprocess import Preprocess
from tests.helpers import encoded, picture, write_tar

PREPROCESS = Preprocess("pil-crop", 16, 18)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("workers", [1, 5])
def test_load_batches_holds_the_rows_of_each_span(views: int, workers: int, tmp_path: Path) -> None:
    files = {str(i): encoded(picture(i)) for i in range(50)} | {"x": b"no image"}
    write_tar(
        tmp_path / "0.tar", [m for k, d in files.items() for m in ((f"{k}.jpg", d), (f"{k}.cls", b"0"))]
    )
    dataset = index_dataset([str(tmp_path / "0.tar")], tmp_path / "d", seed=0)
    [block] = dataset.iter_blocks()
    spans = [(0, 20), (20, 20), (44, 7)]
    loader = ImageLoader(dataset, PREPROCESS, MAX_PIXELS, views)
    for batch, (first, rows) in zip(load_batches(loader, iter(spans), 20, workers), spans, strict=True):
        assert (batch.first, batch.rows) == (first, rows)
        pixels = batch.images.reshape(20, views, 16, 16, 3)
        assert not pixels[rows:].any()
        for i in range(rows):
            key = block.keys[first + i]
            assert (first + i in batch.invalid) == (key == "x")
            for number in range(views):
                want = 0 if key == "x" else PREPROCESS.view(decode(files[key]), key, number)
                np.testing.assert_array_equal(pixels[i, number], want)
