"""A trained model: the embeddings are those of the stored features, and what is wrong is one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lit_fast
from lit_fast.config import LossConfig, TextConfig
from lit_fast.data.dataset import open_dataset
from lit_fast.errors import UserError
from lit_fast.runs.run import open_run
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.tower import load_tower
from tests.helpers import encoded, picture, tiny_vit_arrays
from tests.trained import random_model

SMALL = TextConfig(width=32, depth=1, heads=2, dtype="float32")


@pytest.fixture(scope="module")
def model(trained_run):
    return lit_fast.load(trained_run)


def files(place, count=24):
    """The pictures of the run's dataset, as `samples` made them."""
    place.mkdir(exist_ok=True)
    for i in range(count):
        (place / f"{i}.jpg").write_bytes(encoded(picture(i)))
    return [place / f"{i}.jpg" for i in range(count)]


def test_images_are_embedded_as_they_were_stored(model, trained_run, tmp_path):
    data = open_dataset(trained_run.parent / "d")
    keys = [key for block in data.iter_blocks() for key in block.keys]  # in the order of the rows
    paths = files(tmp_path / "pictures")
    rows, stored = open_run(trained_run).image_embeddings(data)
    got = model.embed_image([paths[int(keys[row])] for row in rows])
    assert got.dtype == np.float32
    # On one machine they are equal. Elsewhere a sum in another order may turn a rounding to bfloat16, 2^-8 of a
    # value at most, and centring a feature makes this part larger.
    np.testing.assert_allclose(got, stored, atol=2**-7)
    assert len(np.unique(got.round(3), axis=0)) == 24
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_paths_pictures_and_arrays_are_the_same_image(model, tmp_path):
    path = files(tmp_path, 1)[0]
    with Image.open(path) as image:
        same = [path, str(path), image, np.asarray(image)]
        got = model.embed_image(same)
    np.testing.assert_array_equal(got, got[[0, 0, 0, 0]])
    grey = picture(3).convert("L")
    np.testing.assert_array_equal(
        model.embed_image([grey]), model.embed_image([np.asarray(grey.convert("RGB"))])
    )


def test_any_number_of_images_and_texts(model, trained_run):
    many = [np.asarray(picture(i)) for i in range(70)]  # more than a batch on four devices
    alone = np.concatenate([model.embed_image(many[i : i + 1]) for i in (0, 63, 64, 69)])
    np.testing.assert_allclose(model.embed_image(many)[[0, 63, 64, 69]], alone, atol=2**-7)
    assert model.embed_image([]).shape == model.embed_text([]).shape == (0, model.width)
    assert model.score(many[:2], []).shape == (2, 0)
    texts = ["picture 3, caption 1", "", "PICTURE 3, caption 1"]
    got = model.embed_text(texts)
    np.testing.assert_array_equal(got, open_run(trained_run).embed_text(texts))
    np.testing.assert_array_equal(got[0], got[2])


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bias", [True, False])
def test_scores_are_the_probabilities_of_the_loss(tiny_vit, name, bias):
    if name == "softmax" and bias:
        return
    model = random_model(load_tower(str(tiny_vit)), SMALL, LossConfig(name=name, bias=bias))
    model.params["t"][:] = np.log(30)
    images, texts = [np.asarray(picture(i)) for i in range(3)], ["a red thing", "blue", "not a"]
    cosines = model.embed_image(images).astype(np.float64) @ model.embed_text(texts).T
    logits = 30 * cosines + (float(model.params["b"][0]) if bias else 0)
    exact = 1 / (1 + np.exp(-logits))
    if name == "softmax":
        exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    # float32 cosines are good to 1e-6, times the temperature.
    np.testing.assert_allclose(model.score(images, texts), exact, rtol=1e-4)
    assert model.score(images, texts).dtype == np.float32


def test_scores_far_from_certain_do_not_overflow(tiny_vit):
    model = random_model(load_tower(str(tiny_vit)), SMALL, LossConfig())
    model.params["t"][:] = np.log(1000)
    one = np.eye(model.width, dtype=np.float32)[:1]
    with np.errstate(all="raise", under="ignore"):
        assert model.compare(one, np.concatenate([one, -one])).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none.jpg", "none.jpg cannot be embedded: there is no such file"),
        (lambda d: str(d), "cannot be embedded: it is a directory or a device"),
        (lambda d: d / "fifo", "fifo cannot be embedded: it is a directory or a device"),
        (lambda d: d / "text.jpg", "text.jpg cannot be embedded: not a JPEG, PNG, WebP, GIF or BMP image"),
        (lambda d: d / "cut.jpg", "cut.jpg cannot be embedded: damaged image"),
        (
            lambda d: d / "bomb.bmp",
            "bomb.bmp cannot be embedded: 60000 x 60000 pixels are more than the limit",
        ),
        (lambda d: Image.open(d / "cut.jpg"), "image 1 cannot be embedded: damaged image"),
        (
            lambda d: np.zeros((8, 8, 3), np.float32),
            r"image 1 .* must be uint8 \[height, width, 3\], not float32",
        ),
        (lambda d: np.zeros((8, 8), np.uint8), r"image 1 .*, not uint8 \[8, 8\]"),
        (lambda d: np.zeros((0, 8, 3), np.uint8), "image 1 cannot be embedded"),
        (lambda d: np.zeros((1, 200_000, 3), np.uint8), "image 1 .* too long and thin"),
        (lambda d: 3, "image 1 cannot be embedded: .* is needed, not int"),
    ],
)
def test_a_bad_image_is_named(model, tmp_path, make, message):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes(encoded(picture(0))[:-200])
    header = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    size = (60_000).to_bytes(4, "little")
    (tmp_path / "bomb.bmp").write_bytes(header + 2 * size + b"\1\0\x18\0" + bytes(24))
    with pytest.raises(UserError, match=message) as caught:
        model.embed_image([picture(1), make(tmp_path)])
    assert "\n" not in str(caught.value)


def test_one_alone_is_not_a_list(model):
    for single in ("a.jpg", Path("a.jpg"), picture(0)):
        with pytest.raises(UserError, match="give a list"):
            model.embed_image(single)
    with pytest.raises(UserError, match="give a list"):
        model.embed_text("a dog")


def test_text_needs_no_vision_weights_and_moved_ones_can_be_named(trained_run, tiny_vit, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    weights, other = tmp_path / "moved.npz", tmp_path / "other.npz"
    shutil.copy(tiny_vit, weights)
    arrays = tiny_vit_arrays()
    arrays["cls"] += 1
    np.savez(other, **arrays)
    told = (run / "tower.json").read_text()
    (run / "tower.json").write_text(told.replace(str(tiny_vit), str(tmp_path / "gone.npz")))
    model = lit_fast.load(run)
    assert model.embed_text(["a"]).shape == (1, model.width)
    with pytest.raises(
        UserError, match=r"gone.npz.*; if the vision tower's weights have moved, name them with --tower"
    ):
        model.embed_image([picture(0)])
    with pytest.raises(UserError, match=r"other.npz is not the vision tower that \S+run was trained with"):
        lit_fast.load(run, tower=str(other)).embed_image([picture(0)])
    moved = lit_fast.load(run, tower=str(weights)).embed_image([picture(0)])
    np.testing.assert_array_equal(moved, lit_fast.load(trained_run).embed_image([picture(0)]))


def test_steps_and_averages_are_the_run_s(trained_run):
    for options in ({"step": 2}, {"average": True}):
        model, run = lit_fast.load(trained_run, **options), open_run(trained_run, **options)
        np.testing.assert_array_equal(model.embed_text(["a b"]), run.embed_text(["a b"]))
        assert (model.step, model.average) == (run.step, "average" in options)
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        lit_fast.load(trained_run, step=3)


def test_features_that_were_not_made_here_have_no_vision_tower(tiny_vit, trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    (run / "tower.json").write_text(
        '{"name": "n", "source": "s", "identity": "i", "width": 32, "dtype": "float16"}'
    )
    model = lit_fast.load(run)
    assert len(model.embed_text(["a"])) == 1
    with pytest.raises(UserError, match="were not made by lit-fast embed, so images cannot be embedded"):
        model.embed_image([picture(0)])


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        lit_fast.load(tmp_path / "none")
    with pytest.raises(UserError, match="is not a run"):
        lit_fast.load(str(tmp_path))


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, lit_fast; lit_fast.load; print(any(m in sys.modules for m in ('jax', 'numpy', 'PIL')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_reduced_decoding_is_the_tower_s(tiny_vit, tmp_path):
    tower = load_tower(str(tiny_vit))
    large = tmp_path / "large.jpg"
    large.write_bytes(encoded(picture(0, 800, 700)))
    from lit_fast.towers.embed import open_tower, read_pixels

    reduced = open_tower(str(tiny_vit), {"reduced_decode": True, "max_pixels": 5}).preprocess
    assert reduced == Preprocess(**(tower.preprocess.__dict__ | {"reduced": True}))
    assert (read_pixels(large, "", reduced) != read_pixels(large, "", tower.preprocess)).any()
