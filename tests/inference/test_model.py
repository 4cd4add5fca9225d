"""A trained model: its embeddings equal the stored features, its scores the loss; errors are one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lit_fast
from lit_fast.cli.main import main
from lit_fast.config import LossConfig, TextConfig
from lit_fast.data.dataset import open_dataset
from lit_fast.errors import UserError
from lit_fast.runs.run import open_run
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.tower import load_tower
from tests.helpers import encoded, picture, tiny_vit_arrays
from tests.trained import random_model
from tests.web import running_hub  # noqa: F401

SMALL = TextConfig(width=32, depth=1, heads=2, dtype="float32")


@pytest.fixture(scope="module")
def model(trained_run):
    return lit_fast.load(trained_run)


def files(directory, count=24):
    """Write the pictures of the run's dataset, as `samples` draws them."""
    directory.mkdir(exist_ok=True)
    for i in range(count):
        (directory / f"{i}.jpg").write_bytes(encoded(picture(i)))
    return [directory / f"{i}.jpg" for i in range(count)]


def test_embed_image_equals_the_stored_features(model, trained_run, tmp_path):
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


def test_embed_image_of_paths_pictures_and_arrays_is_equal(model, tmp_path):
    path = files(tmp_path, 1)[0]
    with Image.open(path) as image:
        same = [path, str(path), image, np.asarray(image)]
        got = model.embed_image(same)
    np.testing.assert_array_equal(got, got[[0, 0, 0, 0]])
    grey = picture(3).convert("L")
    np.testing.assert_array_equal(
        model.embed_image([grey]), model.embed_image([np.asarray(grey.convert("RGB"))])
    )


def test_encode_image_and_text_are_embed_image_and_text(model):
    """CLIP's users call them by these names."""
    images, texts = [picture(0), picture(1)], ["a", "b c"]
    np.testing.assert_array_equal(model.encode_image(images), model.embed_image(images))
    np.testing.assert_array_equal(model.encode_text(texts), model.embed_text(texts))


def test_embeddings_are_independent_of_the_batch(model, trained_run):
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
def test_score_equals_the_probabilities_of_the_loss(tiny_vit, name, bias):
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


def test_compare_with_extreme_logits_does_not_overflow(tiny_vit):
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
def test_embed_image_bad_image_is_named(model, tmp_path, make, message):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes(encoded(picture(0))[:-200])
    header = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    size = (60_000).to_bytes(4, "little")
    (tmp_path / "bomb.bmp").write_bytes(header + 2 * size + b"\1\0\x18\0" + bytes(24))
    with pytest.raises(UserError, match=message) as caught:
        model.embed_image([picture(1), make(tmp_path)])
    assert "\n" not in str(caught.value)


def test_embed_of_a_single_item_raises(model):
    for single in ("a.jpg", Path("a.jpg"), picture(0)):
        with pytest.raises(UserError, match="give a list"):
            model.embed_image(single)
    with pytest.raises(UserError, match="give a list"):
        model.embed_text("a dog")


def test_moved_vision_weights_are_needed_for_images_only(trained_run, tiny_vit, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    weights, other = tmp_path / "moved.npz", tmp_path / "other.npz"
    shutil.copy(tiny_vit, weights)
    arrays = tiny_vit_arrays()
    arrays["cls"] += 1
    np.savez(other, **arrays)
    tower_json = (run / "tower.json").read_text()
    (run / "tower.json").write_text(tower_json.replace(str(tiny_vit), str(tmp_path / "gone.npz")))
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


def test_load_step_or_average_equals_the_run(trained_run):
    for options in ({"step": 2}, {"average": True}):
        model, run = lit_fast.load(trained_run, **options), open_run(trained_run, **options)
        np.testing.assert_array_equal(model.embed_text(["a b"]), run.embed_text(["a b"]))
        assert (model.step, model.average) == (run.step, "average" in options)
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        lit_fast.load(trained_run, step=3)


def test_load_run_with_imported_features_embeds_text_only(tiny_vit, trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    (run / "tower.json").write_text(
        '{"name": "n", "source": "s", "identity": "i", "width": 32, "dtype": "float16"}'
    )
    model = lit_fast.load(run)
    assert len(model.embed_text(["a"])) == 1
    with pytest.raises(UserError, match="were not made by lit-fast embed, so images cannot be embedded"):
        model.embed_image([picture(0)])


def test_load_other_directories_raises(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        lit_fast.load(tmp_path / "none")
    with pytest.raises(UserError, match="is not a run"):
        lit_fast.load(str(tmp_path))


@pytest.mark.parametrize("spec", ["hf:owner/model", "owner/model"])
def test_load_from_the_hub_gives_the_exported_model(hub, trained_run, tmp_path, spec):
    assert main(["export", str(trained_run), "--out", str(tmp_path / "out")]) == 0
    hub.add("owner/model", tmp_path / "out")
    model, exported = lit_fast.load(spec), lit_fast.load(tmp_path / "out")
    assert model.name == "owner/model"
    np.testing.assert_array_equal(model.score([picture(0)], ["a"]), exported.score([picture(0)], ["a"]))
    assert not any("README.md" in path for path in hub.downloads)


def test_load_from_the_hub_without_an_exported_model_fails_in_one_line(hub):
    hub.add("owner/other", {"config.json": b"{}"})
    for spec, message in (
        ("hf:owner/other", "has no tower.json"),
        ("owner/none", "does not exist or is private"),
    ):
        with pytest.raises(
            UserError, match=f"{spec} is not a directory here, and as a repository .*{message}"
        ):
            lit_fast.load(spec)


def test_import_lit_fast_imports_no_jax():
    code = (
        "import sys, lit_fast; lit_fast.load; print(any(m in sys.modules for m in ('jax', 'numpy', 'PIL')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_open_tower_with_reduced_decode_changes_pixels(tiny_vit, tmp_path):
    tower = load_tower(str(tiny_vit))
    large = tmp_path / "large.jpg"
    large.write_bytes(encoded(picture(0, 800, 700)))
    from lit_fast.towers.embed import open_tower, read_pixels

    reduced = open_tower(str(tiny_vit), {"reduced_decode": True, "max_pixels": 5}).preprocess
    assert reduced == Preprocess(**(tower.preprocess.__dict__ | {"reduced": True}))
    assert (read_pixels(large, "", reduced) != read_pixels(large, "", tower.preprocess)).any()
