"""`verify`: real damage of every kind is found, named and repaired; intact data are not changed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import BFLOAT16, Features, features_digest, open_features
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.embed.tokenize import tokenize_dataset
from lit_fast.embed.verify.dataset import verify_dataset
from lit_fast.embed.verify.shard_scan import row_hashes
from lit_fast.errors import UserError
from tests.embed.contents import patch_shard_rows, tree
from tests.helpers import encoded, picture, tiny_vit_arrays, write_tar

ROWS = 1500  # two small shards


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path) -> Path:
    """A directory with an embedded, tokenized dataset d, its tar and its tower."""
    root = tmp_path_factory.mktemp("verify")
    files = [encoded(picture(i, 40, 36), quality=60) for i in range(ROWS)]
    members = []
    for i, data in enumerate(files):
        members += [(f"{i}.jpg", data if i != 77 else b"no image"), (f"{i}.txt", f"picture {i}".encode())]
    write_tar(root / "0.tar", members)
    shutil.copy(tiny_vit, root / "tiny.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch_shard_rows(patch)
        index_dataset([str(root / "0.tar")], root / "d", seed=0)
        embed_dataset(root / "d", str(root / "tiny.npz"), batch_size=16)
        tokenize_dataset(root / "d", train_vocab=280, name="words")
    return root / "d"


@pytest.fixture
def dataset(made: Path, tmp_path: Path, small_shards: None) -> Dataset:
    """A copy to damage; its images and its tower stay where they are."""
    shutil.copytree(made, tmp_path / "d")
    return open_dataset(tmp_path / "d")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("WRONG", "note"))]


def rewrite(features: Features, first: int, values: np.ndarray, *, manifest: bool = False) -> None:
    """Store other values, with right checksums; with `manifest`, declare them."""
    features.array()[first : first + len(values)].write(values).result()
    if manifest:
        recorded = features.manifest(first // 1024)
        stored = features.read_all()[recorded.first : recorded.first + recorded.rows]
        features.write_manifest(replace(recorded, features=features_digest(stored)))


def test_verify_of_an_intact_dataset_finds_and_changes_nothing(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(dataset.path)
    capsys.readouterr()
    assert main(["verify", str(dataset.path)]) == 0
    out = capsys.readouterr().out
    assert "rows embedded again, smallest cosine 0.9999" in out or "smallest cosine 1.0000" in out
    assert f"{dataset.path} is right: 1,500 rows; index, captions, tokens words, features tiny" in out
    assert main(["verify", str(dataset.path), "--repair"]) == 0
    assert tree(dataset.path) == before


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def damage_flip(features: Features) -> None:
    flip(Path(features.path) / "c/0/0", 5000)


def damage_truncate(features: Features) -> None:
    path = Path(features.path) / "c/1/0"
    path.write_bytes(path.read_bytes()[:-100])


def damage_swap(features: Features) -> None:
    one, two = Path(features.path) / "c/0/0", Path(features.path) / "c/1/0"
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])


def damage_remove(features: Features) -> None:
    (Path(features.path) / "c/1/0").unlink()


def damage_manifest_keys(features: Features) -> None:
    features.write_manifest(replace(features.manifest(1), keys="0" * 32))


def damage_manifest_tower(features: Features) -> None:
    features.write_manifest(replace(features.manifest(1), tower="0" * 32))


def damage_manifest_shard(features: Features) -> None:
    shutil.copy(features.manifest_path(0), features.manifest_path(1))


def damage_manifest_text(features: Features) -> None:
    Path(features.manifest_path(0)).write_text('{"shard": 0')


def damage_manifest_gone(features: Features) -> None:
    Path(features.manifest_path(0)).unlink()


def damage_nan(features: Features) -> None:
    values = features.read_all()[20:21]
    values[0, 3] = np.nan
    rewrite(features, 20, values, manifest=True)


def damage_zero(features: Features) -> None:
    rewrite(features, 1100, np.zeros((3, 32), BFLOAT16), manifest=True)


def damage_invalid_row(features: Features) -> None:
    features.write_manifest(replace(features.manifest(0), invalid={9: "damaged"}))


def damage_one_value(features: Features) -> None:
    values = features.read_all()[7:8]
    values[0, 0] += 1
    rewrite(features, 7, values)


def damage_run(features: Features) -> None:
    rewrite(features, 200, np.repeat(features.read_all()[200:201], 40, axis=0), manifest=True)


def damage_half(features: Features) -> None:
    values = features.read_all()[1024:1424]
    assert values.any(axis=1).all()
    values[::2] = values[1::4] = values[0]
    rewrite(features, 1024, values, manifest=True)


def damage_metadata(features: Features) -> None:
    (Path(features.path) / "zarr.json").write_text("{")


DAMAGES = {
    damage_flip: "shard 0: cannot be read, the blocks from row 0: DATA_LOSS",
    damage_truncate: "shard 1: cannot be read, the blocks from row 1,024: DATA_LOSS",
    damage_swap: "shard 1: does not hold the features that its manifest was written for",
    damage_remove: "shard 1: cannot be read, the blocks from row 1,024: NOT_FOUND",
    damage_manifest_keys: "is of other rows than the dataset has",
    damage_manifest_tower: "names another tower than tower.json",
    damage_manifest_shard: "00001.json is damaged: ValueError it is of another shard",
    damage_manifest_text: "00000.json is damaged: not JSON",
    damage_manifest_gone: "shard 0: is not there (it has no manifest); finish it with: lit-fast embed",
    damage_nan: "shard 0: row 20: NaN or infinite",
    damage_zero: "shard 1: rows 1,100, 1,101, 1,102: zero and not marked invalid",
    damage_invalid_row: "shard 0: row 9: marked invalid and not zero",
    damage_one_value: "shard 0: does not hold the features that its manifest was written for",
    damage_run: "shard 0: rows 200 to 239 all have the same features",
    damage_half: "shard 1: 300 of 475 rows from row 1,024 on have the same features",
    damage_metadata: "cannot be opened",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_verify_finds_and_repairs_damaged_features(damage, dataset, capsys) -> None:
    features = open_features(dataset)
    before = tree(dataset.path)
    damage(features)
    capsys.readouterr()
    command = ["verify", str(dataset.path), "--sample", "0", "--json"]
    assert main([*command, str(Path(dataset.path).parent / "out.json")]) == 1
    found = lines(capsys)
    assert any(DAMAGES[damage] in line for line in found), found
    out = json.loads((Path(dataset.path).parent / "out.json").read_text())
    assert (out["right"], len(out["findings"])) == (False, len(found))
    # The remedy, with the batches that the store was made in.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_fast.embed.extract.default_batch_size", lambda: 16)
        assert verify_dataset(dataset.path, tower="tiny", sample=0, repair=True)
    assert tree(dataset.path) == before


def test_verify_finds_features_of_other_weights(dataset, tmp_path, capsys) -> None:
    """A store that says it is of one tower and holds the vectors of another."""
    arrays = tiny_vit_arrays()
    for name in arrays:
        arrays[name] = arrays[name] + np.float32(0.05)
    np.savez(tmp_path / "other.npz", **arrays)
    embed_dataset(dataset.path, str(tmp_path / "other.npz"), name="other")
    features, other = open_features(dataset, "tiny"), open_features(dataset, "other")
    for shard, first in enumerate((0, 1024)):
        recorded = replace(other.manifest(shard), tower=features.identity)
        rewrite(features, first, other.read_all()[first : first + 1024])
        features.write_manifest(recorded)
    assert not verify_dataset(dataset.path, tower="tiny")
    found = lines(capsys)
    assert len(found) == 2
    assert all("of the rows embedded again differ from the stored ones (row" in line for line in found)
    assert verify_dataset(dataset.path, tower="tiny", sample=0)
    # other weights under the name of the file that tower.json names: refused, nothing is removed
    np.savez(tmp_path / "other.npz", **tiny_vit_arrays())
    before = tree(dataset.path)
    capsys.readouterr()
    assert not verify_dataset(dataset.path, tower="other")
    assert "holds other weights than those that made the features; restore" in lines(capsys)[0]
    with pytest.raises(UserError, match=r"cannot be repaired: .*holds other weights"):
        verify_dataset(dataset.path, tower="other", repair=True)
    assert tree(dataset.path) == before


def test_verify_without_weights_or_images_checks_the_rest(dataset, made, tmp_path, capsys) -> None:
    tower = Path(dataset.path) / "features/tiny/tower.json"
    value = json.loads(tower.read_text())
    tower.write_text(json.dumps(value | {"source": str(tmp_path / "gone.npz")}))
    assert verify_dataset(dataset.path)
    assert "note  features tiny: no row was embedded again: tower" in lines(capsys)[0]
    tower.write_text(json.dumps(value))
    recorded = json.loads((Path(dataset.path) / "dataset.json").read_text())
    recorded["sources"][0]["path"] = str(tmp_path / "gone.tar")
    (Path(dataset.path) / "dataset.json").write_text(json.dumps(recorded))
    assert verify_dataset(dataset.path)
    notes = lines(capsys)
    assert "note  sources: 1 not read: " in notes[0]
    assert "if they have moved: lit-fast index --relocate OLD=NEW" in notes[0]
    assert "note  features tiny: no row was embedded again: source" in notes[1]
    damage_flip(open_features(dataset))
    before = tree(dataset.path)
    assert not verify_dataset(dataset.path)
    with pytest.raises(UserError, match=r"gone.tar"):
        verify_dataset(dataset.path, repair=True)
    assert tree(dataset.path) == before


@pytest.mark.parametrize("part", ["index", "captions", "tokens/words"])
def test_verify_finds_damaged_records(part, dataset, capsys) -> None:
    [file] = (Path(dataset.path) / part).glob("*.array_record")
    flip(file, 500)  # further on there is padding, which nobody reads
    assert main(["verify", str(dataset.path)]) == 1
    found = lines(capsys)
    assert found[0].startswith(f"WRONG  {part.replace('/', ' ')}, shard ")
    assert str(file) in found[0]


def test_verify_does_not_count_rows_that_cannot_be_embedded_again(dataset, capsys) -> None:
    [file] = (Path(dataset.path) / "index").glob("*.array_record")
    flip(file, file.read_bytes().index(bytes(1000)) - 1000)  # in the second record, before the padding
    capsys.readouterr()
    assert main(["verify", str(dataset.path), "--sample", "400"]) == 1
    out = capsys.readouterr().out
    row = int(re.search(r"row ([\d,]+) and those after it were not embedded again", out)[1].replace(",", ""))
    assert row >= 1024  # those of the first record were, as far as they were not still on the device
    assert int(re.search(r"(\d+) rows embedded again", out)[1]) < 400


def test_verify_finds_records_of_other_rows(dataset, made, capsys) -> None:
    """Whole records of an equally long dataset, which no checksum betrays."""
    index_dataset([str(made.parent / "0.tar")], Path(dataset.path).parent / "seed1", seed=1)
    shutil.rmtree(Path(dataset.path) / "index")
    shutil.copytree(Path(dataset.path).parent / "seed1/index", Path(dataset.path) / "index")
    assert main(["verify", str(dataset.path), "--sample", "0"]) == 1
    assert "WRONG  index, shard 0: its keys are not those of dataset.json" in lines(capsys)[0]


def test_verify_notes_duplicates(tmp_path, tiny_vit, capsys) -> None:
    files = [encoded(picture(i)) for i in range(20)]
    members = [(f"{i}.jpg", files[i % 19]) for i in range(20)]
    write_tar(
        tmp_path / "0.tar", [m for name, data in members for m in ((name, data), (name[:-3] + "txt", b"x"))]
    )
    index_dataset([str(tmp_path / "0.tar")], tmp_path / "d", seed=0)
    embed_dataset(tmp_path / "d", str(tiny_vit))
    assert verify_dataset(tmp_path / "d")
    [note] = lines(capsys)
    assert "2 rows have the same features as another row, as equal images do (keys" in note
    assert {"0", "19"} <= set(note.split("keys ")[1].rstrip(")").split(", "))


def test_embed_with_a_damaged_manifest_names_the_repair(dataset, made, capsys) -> None:
    (Path(dataset.path) / "features/tiny/manifest/00001.json").write_text("{")
    assert main(["embed", str(dataset.path), "--tower", str(made.parent / "tiny.npz")]) == 2
    assert f"verify {dataset.path} --tower tiny --repair" in capsys.readouterr().err


def test_mistakes(dataset, capsys) -> None:
    assert main(["verify", str(Path(dataset.path) / "no")]) == 2
    assert main(["verify", str(dataset.path), "--tower", "no"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_row_hashes_tell_rows_apart(rows: int, width: int, seed: int) -> None:
    """Equal rows have equal hashes; rows that differ in one bit, or in the order of two values, do not."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 16, (rows, width), np.uint16)
    hashes = row_hashes(bits)
    np.testing.assert_array_equal(row_hashes(np.concatenate([bits, bits])), np.tile(hashes, 2))
    assert len(np.unique(hashes)) == len(np.unique(bits, axis=0))
    other = bits.copy()
    other[np.arange(rows), rng.integers(0, width, rows)] ^= np.uint16(1) << rng.integers(0, 16, rows).astype(
        np.uint16
    )
    assert not (row_hashes(other) == hashes).any()
    turned = bits[:, ::-1]
    assert (row_hashes(turned) == hashes).tolist() == (turned == bits).all(axis=1).tolist()
