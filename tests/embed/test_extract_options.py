"""Options that decide the features: their effect, and the store's record of them."""

from __future__ import annotations

import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset
from lit_fast.data.features import embed_command, matching_features, open_features, with_views
from lit_fast.data.images.decode import decode
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.errors import UserError
from lit_fast.runs.run import image_embeddings
from lit_fast.towers.tower import load_tower
from tests.helpers import encoded, picture, write_tar


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """20 rows, one undecodable; photos large enough for a reduced decoding."""
    members = []
    for i in range(20):
        image = encoded(picture(i, 400, 300)) if i != 7 else b"no image"
        members += [(f"{i}.jpg", image), (f"{i}.txt", b"x")]
    write_tar(tmp_path / "0.tar", members)
    return index_dataset([str(tmp_path / "0.tar")], tmp_path / "d", seed=0)


def test_a_dataset_by_a_relative_path(
    dataset: Dataset, tiny_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorStore takes no path with `..` in it."""
    (Path(dataset.path).parent / "elsewhere").mkdir()
    monkeypatch.chdir(Path(dataset.path).parent / "elsewhere")
    assert main(["embed", "../d", "--tower", str(tiny_vit)]) == 0
    assert main(["verify", "../d"]) == 0


def test_views_lie_side_by_side(dataset: Dataset, tiny_vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed_dataset(dataset.path, str(tiny_vit), name="one", batch_size=6, dtype="float32")
    embed_dataset(dataset.path, str(tiny_vit), name="three", batch_size=6, views=3, dtype="float32")
    one, three = open_features(dataset, "one"), open_features(dataset, "three")
    assert (three.width, three.views, three.array().shape) == (32, 3, (20, 96))
    assert "views" not in one.provenance
    assert one.identity != three.identity
    got = three.read_all(3).astype(np.float32).reshape(20, 3, 32)
    tower = load_tower(str(tiny_vit))
    run = jax.jit(lambda image: tower.embed(tower.params, image[None], jax.numpy.float32)[0])
    [block] = dataset.iter_blocks()
    for row, key in enumerate(block.keys):
        if key == "7":
            assert set(three.invalid_rows()) == {row}
            assert not got[row].any()
            continue
        image = decode(encoded(picture(int(key), 400, 300)))
        for number in range(3):
            want = run(tower.preprocess.view(image, key, number))
            np.testing.assert_allclose(got[row, number], want, rtol=2**-7, atol=1e-3)  # stored in 8 bits
    np.testing.assert_array_equal(three.read_all(), got[:, 0].astype(three.read_all().dtype))
    np.testing.assert_allclose(three.mean(three.invalid_rows()), one.mean(one.invalid_rows()), atol=2e-3)
    # evaluation: view 0, whichever of the two the run was trained with
    for tower_json in (one.provenance, three.provenance):
        assert matching_features(dataset, tower_json).tower in ("one", "three")
        _, embeddings = image_embeddings(dataset, tower_json, np.zeros(32, np.float32))
        assert embeddings.shape == (19, 32)
    with pytest.raises(UserError, match=r"other views\); choose another --name"):
        embed_dataset(dataset.path, str(tiny_vit), name="one", views=2)
    assert main(["verify", str(dataset.path)]) == 0
    assert "features three: 19 rows embedded again" in capsys.readouterr().out


def test_view_zero_does_not_make_the_run_need_views_elsewhere(dataset: Dataset, tiny_vit: Path) -> None:
    embed_dataset(dataset.path, str(tiny_vit), name="other", resolution=16)
    tower = load_tower(str(tiny_vit)).provenance("float32")
    with pytest.raises(UserError) as caught:
        matching_features(dataset, with_views(tower, 4))
    command = str(caught.value).split("make them with: ")[1]
    assert "--views" not in command
    assert main(shlex.split(command)[1:]) == 0
    assert matching_features(dataset, with_views(tower, 4)).tower == "tiny"


OPTIONS = [
    [],
    ["--preprocess", "tf-squash", "--gelu", "tanh"],
    ["--pool", "gap", "--resolution", "16"],
    ["--reduced-decode", "--dtype", "bfloat16"],
    ["--views", "2", "--max-pixels", "1000000"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_a_store_says_how_to_make_it_again(
    options: list[str], dataset: Dataset, tiny_vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", str(dataset.path), "--tower", str(tiny_vit), "--name", "x", *options]) == 0
    features = open_features(dataset)
    before = features.read_all(features.views)
    command = shlex.split(embed_command(dataset, features.provenance, "x"))[1:]
    capsys.readouterr()
    assert main(command) == 0
    assert "is complete" in capsys.readouterr().out
    again = shlex.split(embed_command(dataset, features.provenance, "again"))[1:]
    assert main(again) == 0
    other = open_features(dataset, "again")
    assert other.identity == features.identity
    np.testing.assert_array_equal(other.read_all(other.views), before)
    plain = {
        "--preprocess",
        "--gelu",
        "--pool",
        "--resolution",
        "--reduced-decode",
        "--views",
        "--max-pixels",
    }
    assert plain & set(again) == plain & set(options)


def test_every_option_changes_the_features(dataset: Dataset, tiny_vit: Path) -> None:
    stored = {}
    for number, options in enumerate(({}, {"pool": "gap"}, {"reduced_decode": True}, {"gelu": "tanh"})):
        embed_dataset(dataset.path, str(tiny_vit), name=f"x{number}", **options)
        stored[str(options)] = open_features(dataset, f"x{number}").read_all().astype(np.float32)
    values = list(stored.values())
    for i in range(len(values)):
        for j in range(i):
            assert np.abs(values[i] - values[j]).max() > 1e-3, (list(stored)[i], list(stored)[j])


def test_wrong_options_are_one_line(
    dataset: Dataset, tiny_vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["embed", str(dataset.path), "--tower", str(tiny_vit)]
    for wrong in (
        ["--pool", "mean"], ["--pool", "map"], ["--preprocess", "no"], ["--views", "0"],
        ["--reduced-decode", "--preprocess", "tf-squash"],
    ):  # fmt: skip
        capsys.readouterr()
        assert main([*command, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (Path(dataset.path) / "features").exists()
