"""`noise:N`: pictures of uniform random noise at the size that the tower looks at."""

import io

import numpy as np
import pytest
from PIL import Image

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.data.images.decode import MAX_PIXELS
from lit_fast.data.images.noise import noise_image
from lit_fast.data.images.reader import ImageReader
from lit_fast.towers.loader import ImageLoader
from lit_fast.towers.preprocess import Preprocess
from tests.embed.contents import keys


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    path = tmp_path_factory.mktemp("noise") / "n"
    assert main(["index", "noise:70", "--out", str(path)]) == 0
    return open_dataset(path)


def test_rows_are_numbered_and_have_no_captions(noise):
    assert sorted(keys(noise)) == sorted(f"noise-{i}" for i in range(70))
    assert keys(noise) != sorted(keys(noise))  # shuffled as any other dataset
    assert (noise.captions, noise.captionless, noise.classnames) == (0, 70, ())


@pytest.mark.parametrize("preprocess", [("pil-crop", 32, 40), ("tf-squash", 24, 24), ("hf-crop", 17, 19)])
def test_the_tower_sees_unblurred_uniform_noise(noise, preprocess):
    out = np.empty((70, 1, preprocess[1], preprocess[1], 3), np.uint8)
    assert ImageLoader(noise, Preprocess(*preprocess), MAX_PIXELS).load(0, 70, out) == {}
    values = out.reshape(-1).astype(np.float64)
    # The mean of n uniform bytes varies by 73.9 / sqrt(n), their variance by 5300 / sqrt(n): five times each.
    assert abs(values.mean() - 127.5) < 5 * 73.9 / np.sqrt(len(values))
    assert abs(values.var() - (256**2 - 1) / 12) < 5 * 5300 / np.sqrt(len(values))
    beside = np.corrcoef(out[..., :-1, :].ravel(), out[..., 1:, :].ravel())[0, 1]
    assert abs(beside) < 5 / np.sqrt(len(values))  # resizing would make neighbours alike
    assert len({picture.tobytes() for picture in out}) == 70


def test_a_picture_is_the_same_everywhere(noise):
    pixels = np.asarray(Image.open(io.BytesIO(noise_image(3, 2))))
    words = np.random.Philox(np.random.SeedSequence([1, 3])).random_raw(2).astype("<u8")
    assert pixels.tobytes() == words.tobytes()[:12]
    reader = ImageReader(noise)
    block, i = reader.locate(5)
    assert reader.read(5) == noise_image(int(block.keys[i].removeprefix("noise-")), 224)


def test_it_is_embedded_and_verified_like_any_other(noise, tiny_vit, capsys, monkeypatch, tmp_path):
    (tmp_path / "classnames.txt").write_text("not\nof\nnoise\n")
    monkeypatch.chdir(tmp_path)  # a source without a directory has nothing beside it
    assert main(["index", "noise:70", "--out", str(noise.path)]) == 0
    assert main(["embed", str(noise.path), "--tower", str(tiny_vit)]) == 0
    assert main(["verify", str(noise.path), "--sample", "8"]) == 0
    assert main(["info", str(noise.path)]) == 0
    said = capsys.readouterr().out
    assert "is already indexed: 70 rows" in said
    assert "70 valid, 0 invalid" in said
    assert "all present" in said
    assert main(["index", "noise:90", "--out", str(noise.path), "--append"]) == 0
    assert open_dataset(noise.path).rows == 90
    assert open_dataset(noise.path).left_out == {"duplicate key": 70}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["noise:0"], "does not have 1 to 1,048,576 images"),
        (["noise:99999999999999999999999"], "does not have 1 to 1,048,576 images"),
        (["noise:-1"], "does not exist"),
        (["noise:5", "--captions", "text"], "no columns that options could name"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    assert main(["index", *arguments, "--out", str(tmp_path / "n")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "n").exists()
