"""`lit-fast import-features` of .npy, .safetensors and parquet files: order, alignment and refusals."""

import io
import re
import shlex

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import embed_command, open_features
from lit_fast.embed import import_rows
from lit_fast.embed.importers.parts import relative
from lit_fast.embed.importers.vectors import open_vectors
from lit_fast.errors import UserError
from tests.embed.contents import captions, keys, tree
from tests.web import Hub, running_hub  # noqa: F401

WIDTH = 6
BFLOAT16 = ml_dtypes.bfloat16


def vectors(rows, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(dtype)


def texts(rows, first=0):
    return [f"caption {r}" for r in range(first, first + rows)]


def imports(out, *sources, table=None, **options):
    words = ["import-features", *sources, "--out", out, "--tower", "t"]
    words += [w for n, v in ({"captions-table": table} | options).items() if v for w in (f"--{n}", v)]
    return main([str(word) for word in words])


def stored(path):
    dataset = open_dataset(path)
    features = open_features(dataset)
    return keys(dataset), captions(dataset), features.read_all(), features.invalid_rows()


def error(capsys):
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-fast: error: "))


def column(x, kind):
    """A parquet column of vectors, None for a missing one."""
    number = np.float16 if "half" in str(kind) else float
    lists = [None if v is None else [None if n is None else number(n) for n in v] for v in x]
    return pa.array(lists, kind)


KINDS = {
    "fixed": pa.list_(pa.float32(), WIDTH),
    "list": pa.list_(pa.float32()),
    "large": pa.large_list(pa.float64()),
    "half": pa.list_(pa.float16()),
    "fixed half": pa.list_(pa.float16(), WIDTH),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_column_becomes_features_beside_captions_and_keys(kind, tmp_path, capsys):
    x = vectors(2500, np.float16).astype(np.float32)
    table = {"emb": column(x, KINDS[kind]), "caption": texts(2500), "key": [f"k{i}" for i in range(2500)]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet", row_group_size=700)
    assert imports(tmp_path / "d", tmp_path / "x.parquet") == 0
    shown = capsys.readouterr()
    assert re.search(r"features \(parquet\): x.parquet; 2,500 rows of 6 float\d\d a row in emb", shown.err)
    assert "captions: column caption (first: 'caption 0'); keys: column key" in shown.err
    names, found, features, invalid = stored(tmp_path / "d")
    assert names == table["key"]
    assert found == [[text] for text in table["caption"]]
    np.testing.assert_array_equal(features, x.astype(BFLOAT16))
    assert not invalid
    assert main(["verify", str(tmp_path / "d")]) == 0


def test_parquet_rows_without_a_whole_vector_are_invalid_and_counted(tmp_path, capsys):
    x = [list(v) for v in vectors(8)]
    x[1], x[2], x[3], x[4][2], x[5] = None, [], x[3][:4], None, [0.0] * WIDTH
    pq.write_table(pa.table({"v": column(x, KINDS["list"]), "text": texts(8)}), tmp_path / "x.parquet")
    assert imports(tmp_path / "d", tmp_path / "x.parquet") == 0
    assert "3 valid, 5 invalid (2 no vector, 1 a vector of 4 numbers" in capsys.readouterr().out
    assert stored(tmp_path / "d")[3] == {
        1: "no vector", 2: "no vector", 3: "a vector of 4 numbers, not 6", 4: "non-finite feature", 5: "zero feature",
    }  # fmt: skip


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_parquet_vectors_equal_the_written_ones_for_any_rows(tmp_path_factory, data):
    rows = data.draw(st.integers(1, 60))
    missing = data.draw(st.sets(st.integers(1, rows), max_size=4))
    x = vectors(rows)
    kind = data.draw(st.sampled_from(list(KINDS)[:3]))
    path = str(tmp_path_factory.getbasetemp() / "drawn.parquet")
    column_ = column([None if i in missing else v for i, v in enumerate(x)], KINDS[kind])
    pq.write_table(pa.table({"v": column_}), path, row_group_size=data.draw(st.integers(1, 20)))
    opened = open_vectors(path)
    for _ in range(3):
        wanted = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1))))
        values, reasons = opened.read(wanted)
        assert {int(wanted[i]) for i in reasons} == missing & set(wanted.tolist())
        whole = [i for i in range(len(wanted)) if i not in reasons]
        np.testing.assert_array_equal(values[whole], x[wanted[whole]])


def test_flipped_bit_of_a_parquet_footer_gives_one_line_or_the_rows_that_were_written(tmp_path):
    x, path, opened = vectors(12), tmp_path / "x.parquet", 0
    table = pa.table({"v": column(x, KINDS["fixed"])})
    pq.write_table(table, path, row_group_size=5, compression="none", store_schema=False)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    for position in range(len(whole) - 8 - footer, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 2]) + whole[position + 1 :])
        try:
            found = open_vectors(str(path))
            values, reasons = found.read(np.arange(found.shape.rows))
        except UserError as damage:
            assert "\n" not in str(damage)  # noqa: PT017
            continue
        opened += 1
        assert found.shape.rows == 12
        whole_rows = [i for i in range(12) if i not in reasons]
        np.testing.assert_array_equal(values[whole_rows], x[whole_rows])
    assert opened


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, BFLOAT16])
def test_safetensors_file_becomes_features(dtype, tmp_path, capsys):
    x = vectors(30, dtype)
    save_file({"image": x, "text": x[::-1].copy(), "ids": np.arange(30)}, tmp_path / "x.safetensors")
    assert imports(tmp_path / "d", tmp_path / "x.safetensors") == 2
    assert "has several candidates for features (image, text); name one with --features" in error(capsys)
    assert imports(tmp_path / "d", tmp_path / "x.safetensors", features="image") == 0
    np.testing.assert_array_equal(stored(tmp_path / "d")[2], x.astype(BFLOAT16))
    assert imports(tmp_path / "e", tmp_path / "x.safetensors", features="ids") == 2
    assert "holds I64 [30] in ids" in error(capsys)
    assert imports(tmp_path / "e", tmp_path / "x.safetensors", features="imago") == 2
    assert "has no 'imago'; choose from image" in error(capsys)


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_are_read_in_natural_order(order, tmp_path, capsys):
    x = vectors(24, ">f4")
    for number in range(12):
        np.save(tmp_path / f"{number}.npy", np.asarray(x[2 * number : 2 * number + 2], order=order))
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "{t}"}}\n' for t in texts(24)))
    assert imports(tmp_path / "d", tmp_path, table=tmp_path / "t.jsonl") == 0
    assert "features (npy): 12 files, 0.npy to 11.npy; 24 rows of 6 float32 a row" in capsys.readouterr().err
    names, found, features, _ = stored(tmp_path / "d")
    assert names[2:5] == ["1/0", "1/1", "2/0"]
    assert found == [[text] for text in texts(24)]
    np.testing.assert_array_equal(features, x.astype(BFLOAT16))
    shuffled = [tmp_path / f"{number}.npy" for number in range(11, -1, -1)]
    assert imports(tmp_path / "e", *shuffled, table=tmp_path / "t.jsonl") == 0
    assert imports(tmp_path / "f", f"{tmp_path}/{{0..11}}.npy", table=tmp_path / "t.jsonl") == 0
    for other in ("e", "f"):
        assert stored(tmp_path / other)[0] == names
        np.testing.assert_array_equal(stored(tmp_path / other)[2], features)


def test_files_of_equal_names_in_two_directories_lose_no_row(tmp_path):
    for directory in ("train", "val"):
        (tmp_path / "s" / directory).mkdir(parents=True)
        np.save(tmp_path / "s" / directory / "x.npy", vectors(3))
    assert imports(tmp_path / "d", tmp_path / "s/train/x.npy", tmp_path / "s/val/x.npy") == 0
    assert stored(tmp_path / "d")[0] == [f"{d}/x.npy/{i}" for d in ("train", "val") for i in range(3)]
    assert relative(["/a/b/c.npy"]) == ["c.npy"]
    assert relative(["hf://a/b/c", "hf://a/d/c"]) == ["b/c", "d/c"]


def test_captions_of_several_tables_follow_each_other(tmp_path, capsys):
    np.save(tmp_path / "x.npy", vectors(5))
    pq.write_table(pa.table({"caption": texts(2)}), tmp_path / "t0.parquet")
    pq.write_table(pa.table({"caption": texts(3, 2)}), tmp_path / "t1.parquet")
    assert imports(tmp_path / "d", tmp_path / "x.npy", table=tmp_path / "t*.parquet") == 0
    assert stored(tmp_path / "d")[1] == [[text] for text in texts(5)]
    pq.write_table(pa.table({"caption": texts(2, 2)}), tmp_path / "t1.parquet")
    assert imports(tmp_path / "e", tmp_path / "x.npy", table=tmp_path / "t*.parquet") == 2
    assert "t0.parquet to t1.parquet has 4 rows" in error(capsys)
    assert not (tmp_path / "e").exists()


def test_table_with_other_keys_than_the_features_is_refused(tmp_path, capsys):
    names = ["a", "b", "c", "d"]
    pq.write_table(pa.table({"v": column(vectors(4), KINDS["fixed"]), "key": names}), tmp_path / "x.parquet")
    (tmp_path / "t.csv").write_text("key,text\n" + "".join(f"{n},of {n}\n" for n in names))
    assert imports(tmp_path / "d", tmp_path / "x.parquet", table=tmp_path / "t.csv") == 0
    assert stored(tmp_path / "d")[1] == [[f"of {n}"] for n in names]
    (tmp_path / "t.csv").write_text("key,text\n" + "".join(f"{n},of {n}\n" for n in "acbd"))
    assert imports(tmp_path / "e", tmp_path / "x.parquet", table=tmp_path / "t.csv") == 2
    assert "t.csv has 'c' in key, row 2, where the features have 'b' in key" in error(capsys)


def test_captions_of_a_dataset_are_those_of_its_rows(tmp_path, capsys):
    given = [(f"k{i}", v, [f"a {i}", f"b {i}"]) for i, v in enumerate(vectors(5))]
    import_rows(given, tmp_path / "one", tower="t")
    np.save(tmp_path / "x.npy", vectors(5, seed=1))
    assert imports(tmp_path / "d", tmp_path / "x.npy", table=tmp_path / "one") == 0
    assert stored(tmp_path / "d")[:2] == stored(tmp_path / "one")[:2]
    assert imports(tmp_path / "e", tmp_path / "x.npy", table=tmp_path / "one", captions="text") == 2
    assert "has no columns that options could name" in error(capsys)
    np.save(tmp_path / "x.npy", vectors(6, seed=1))
    assert imports(tmp_path / "e", tmp_path / "x.npy", table=tmp_path / "one") == 2
    assert "one has 5 rows, but" in error(capsys)


def mutated(data, draw):
    """Bytes with some flipped, and perhaps the end cut off."""
    changed = bytearray(data)
    for position in draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=4)):
        changed[position] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.sampled_from([len(data), len(data) // 2, len(data) - 1]))])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_files_give_one_line_or_vectors(tmp_path_factory, data):
    suffix, whole = data.draw(st.sampled_from([(".npy", NPY), (".safetensors", SAFETENSORS)]))
    path = tmp_path_factory.getbasetemp() / f"mutated{suffix}"
    path.write_bytes(mutated(whole, data.draw))
    try:
        opened = open_vectors(str(path))
        if opened.shape.rows:
            rows = np.arange(min(opened.shape.rows, 50))
            values, _ = opened.read(rows)
            assert values.shape == (len(rows), opened.shape.width)
    except UserError as damage:
        assert "\n" not in str(damage)  # noqa: PT017


def npy(x):
    buffer = io.BytesIO()
    np.save(buffer, x, allow_pickle=True)
    return buffer.getvalue()


def parquet(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def safetensors(**tensors):
    from safetensors.numpy import save

    return save(tensors)


NPY, SAFETENSORS = npy(vectors(20)), safetensors(a=vectors(20), b=np.arange(4))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.npy": npy(np.zeros((3, 4), int))}, "save features as floats"),
        ({"a.npy": npy(np.array([{}, {}]))}, "not an .npy file of numbers"),
        ({"a.npy": npy(vectors(9))[:-1]}, "is damaged"),
        ({"a.npy": npy(vectors(9)), "b.npy": npy(vectors(9)[:, :5])}, "5 float32 a row"),
        ({"a.npy": npy(vectors(9)), "b.npy": npy(vectors(9, "f2"))}, "6 float16 a row"),
        ({"a.npy": npy(vectors(9)), "b.safetensors": safetensors(x=vectors(9))}, "choose one with --format"),
        ({"a.safetensors": safetensors(x=vectors(9))[:-1]}, "is damaged or is not a .safetensors file"),
        ({"a.safetensors": safetensors(x=vectors(9)[0])}, "no tensor of floats"),
        ({"a.safetensors": b"\xff" * 100}, "is damaged or is not a .safetensors file"),
        ({"a.parquet": parquet(x=[[1, 2]])}, "no column of lists of floats"),
        ({"a.parquet": parquet(x=[[1.0]], y=[[1.0]])}, "name one with --features"),
        ({"a.parquet": parquet(x=pa.array([None, []], KINDS["list"]))}, "no vector in x"),
        (
            {"a.npy": npy(np.zeros((1, 70_000)))},
            "70,000 numbers per row, more than 65,536; give features of a tower",
        ),
        ({"a.parquet": parquet(x=[[1.0]])[:-9]}, "is damaged or is not a parquet file"),
        ({"a.txt": b""}, "holds no features"),
    ],
)
def test_files_that_hold_no_features_are_refused_in_one_line(files, message, tmp_path, capsys):
    (tmp_path / "s").mkdir()
    for name, data in files.items():
        (tmp_path / "s" / name).write_bytes(data)
    assert imports(tmp_path / "d", tmp_path / "s") == 2
    assert message in error(capsys)
    assert not (tmp_path / "d").exists()


def test_sources_without_a_known_format_are_named(tmp_path, capsys):
    (tmp_path / "x.bin").write_bytes(b"x")
    for source, message in [
        (tmp_path / "x.bin", "does not have a suffix of features"),
        (tmp_path / "y.bin", "does not exist"),
        ("https://127.0.0.1/x.npy", "download it first"),
    ]:
        assert imports(tmp_path / "d", source) == 2
        assert message in error(capsys)
    np.save(tmp_path / "x.npy", vectors(2))
    assert imports(tmp_path / "d", tmp_path / "x.npy", features="x") == 2
    assert "has no names for --features x" in error(capsys)
    assert imports(tmp_path / "d", tmp_path / "x.npy", format="parquet") == 2
    assert "is not a .parquet or .pq file" in error(capsys)


def test_interrupted_import_of_parquet_continues_to_the_same_bytes(tmp_path, monkeypatch):
    from lit_fast.embed.importers import import_features as module

    for part in range(3):
        x = column(vectors(900, seed=part), KINDS["fixed"])
        pq.write_table(pa.table({"v": x, "text": texts(900, 900 * part)}), tmp_path / f"{part}.parquet")
    assert imports(tmp_path / "whole", tmp_path) == 0

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", fail)
        with pytest.raises(KeyboardInterrupt):
            module.import_features(tmp_path, tmp_path / "d", "t")
    assert imports(tmp_path / "d", tmp_path) == 0
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def test_column_of_a_hub_dataset_becomes_features(hub: Hub, tmp_path, capsys):
    x, files = vectors(50), {}
    for part in range(2):
        rows = slice(25 * part, 25 * part + 25)
        files[f"data/train-{part:05d}.parquet"] = parquet(
            image_embedding=column(x[rows], KINDS["list"]), caption=texts(25, 25 * part)
        )
    hub.add("datasets/someone/features", files)
    pattern = "hf://datasets/someone/features/data/*.parquet"
    assert imports(tmp_path / "d", pattern) == 0
    names, found, features, _ = stored(tmp_path / "d")
    assert names[25] == "train-00001/0"
    assert found == [[text] for text in texts(50)]
    np.testing.assert_array_equal(features, x.astype(BFLOAT16))
    assert imports(tmp_path / "d", pattern) == 0  # complete
    np.save(tmp_path / "x.npy", x)
    assert imports(tmp_path / "e", tmp_path / "x.npy", table=pattern) == 0
    assert stored(tmp_path / "e")[1] == found
    assert imports(tmp_path / "f", "hf://datasets/someone/absent/*.parquet") == 2
    assert "error" in error(capsys)


def test_guesses_can_be_declined(tmp_path, capsys):
    table = {"v": column(vectors(4), KINDS["fixed"]), "key": ["a"] * 4, "text": texts(4)}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    words = ["--out", tmp_path / "d", "--tower", "t", "--captions", "", "--key", ""]
    assert main([str(word) for word in ["import-features", tmp_path / "x.parquet", *words]]) == 0
    assert stored(tmp_path / "d")[:2] == ([f"x/{i}" for i in range(4)], [[]] * 4)
    dataset = open_dataset(tmp_path / "d")
    command = embed_command(dataset, open_features(dataset).provenance, "t")
    assert shlex.split(command)[-4:] == ["--captions", "", "--key", ""]
    assert main(shlex.split(command)[1:]) == 0


def test_import_command_of_a_store_makes_the_same_store(tmp_path, capsys):
    np.save(tmp_path / "x y.npy", vectors(5))
    (tmp_path / "t.csv").write_text("id,words\n" + "".join(f"k{i},w {i}\n" for i in range(5)))
    options = {"table": tmp_path / "t.csv", "captions": "words", "key": "id"}
    assert imports(tmp_path / "d", tmp_path / "x y.npy", **options) == 0
    dataset = open_dataset(tmp_path / "d")
    command = embed_command(dataset, open_features(dataset).provenance, "t")
    words = shlex.split(command)
    assert words[:3] == ["lit-fast", "import-features", str(tmp_path / "x y.npy")]
    capsys.readouterr()
    assert main(words[1:]) == 0
    assert "imported 5 rows" in capsys.readouterr().out


def test_vectors_are_refused_where_a_file_is_no_regular_file(tmp_path):
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(UserError, match="is not a regular file"):
        open_vectors(str(tmp_path / "x.npy"))
