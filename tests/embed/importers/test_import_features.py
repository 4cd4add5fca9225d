"""`lit-fast import-features`: rows, captions and features as the files have them; damage and misfits are refused."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import first_view, open_features
from lit_fast.errors import UserError
from tests.embed.contents import captions, keys, tree

WIDTH = 12


def clip_retrieval(path, counts=(3, 5, 4), dtype=np.float16, seed=0, metadata=True, first=0):
    """A folder as clip-retrieval writes it; the features of all parts, float32."""
    rng = np.random.default_rng(seed)
    (path / "img_emb").mkdir(parents=True)
    (path / "text_emb").mkdir()
    (path / "metadata").mkdir()
    parts, row = [], first
    for number, count in enumerate(counts):
        x = rng.normal(size=(count, WIDTH))
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)
        np.save(path / f"img_emb/img_emb_{number}.npy", x)
        np.save(path / f"text_emb/text_emb_{number}.npy", x)
        if metadata:
            table = {
                "image_path": [f"pictures/{r}.jpg" for r in range(row, row + count)],
                "caption": [f"a red thing number {r}" for r in range(row, row + count)],
                "NSFW": ["UNLIKELY"] * count,
            }
            pq.write_table(pa.table(table), path / f"metadata/metadata_{number}.parquet")
        parts.append(x.astype(np.float32))
        row += count
    return np.concatenate(parts)


def imports(source, out, *more, format="clip-retrieval", tower="clip"):
    arguments = ["import-features", source, "--out", out, "--tower", tower, "--format", format, *more]
    return main([str(a) for a in arguments])


def stored(path):
    dataset = open_dataset(path)
    features = open_features(dataset)
    return keys(dataset), captions(dataset), features.read_all(), features.invalid_rows()


def fails(capsys, *arguments, **options):
    capsys.readouterr()
    assert imports(*arguments, **options) == 2
    errors = capsys.readouterr().err.splitlines()
    return next(line for line in errors if line.startswith("lit-fast: error: "))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4", np.float64])
def test_rows_captions_and_features_in_the_order_of_the_partitions(dtype, tmp_path, capsys):
    want = clip_retrieval(tmp_path / "s", [1] * 9 + [3, 2], dtype)  # part 10 comes after 2
    assert imports(tmp_path / "s", tmp_path / "d") == 0
    assert "imported 14 rows with 14 captions" in capsys.readouterr().out
    names, texts, features, invalid = stored(tmp_path / "d")
    assert names == [f"pictures/{r}.jpg" for r in range(14)]
    assert texts == [[f"a red thing number {r}"] for r in range(14)]
    np.testing.assert_array_equal(features, want.astype(ml_dtypes.bfloat16))
    assert not invalid
    tower = json.loads((tmp_path / "d/features/clip/tower.json").read_text())
    assert tower["imported"]["format"] == "clip-retrieval"
    assert len(tower["imported"]["files"]) == 11


def test_the_same_command_changes_nothing_and_an_interrupted_one_goes_on(tmp_path, capsys):
    clip_retrieval(tmp_path / "s")
    assert imports(tmp_path / "s", tmp_path / "d") == 0
    whole = tree(tmp_path / "d")
    assert imports(tmp_path / "s", tmp_path / "d") == 0
    assert tree(tmp_path / "d") == whole
    # After a kill: no manifest and no tower.json, only the records.
    for gone in (["features/clip/manifest"], ["features"], ["features", "dataset.json"]):
        for name in gone:
            path = tmp_path / "d" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert imports(tmp_path / "s", tmp_path / "d") == 0
        assert tree(tmp_path / "d") == whole


@pytest.mark.parametrize("function", ["write_json", "write_manifest"])
def test_a_killed_import_leaves_nothing_that_looks_whole_and_goes_on(function, tmp_path):
    """Killed with the records but no dataset.json, and with the features but no manifest."""
    clip_retrieval(tmp_path / "s")
    out = tmp_path / "d"
    program = f"""
import os, signal, sys
from lit_fast.cli.main import main
def kill(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "{function}":
        os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(kill)
main(sys.argv[1:])
"""
    options = ["--tower", "clip", "--format", "clip-retrieval"]
    command = [sys.executable, "-c", program, "import-features", tmp_path / "s", "--out", out, *options]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    if function == "write_json":
        assert list(out.glob("index/*"))
        assert not (out / "dataset.json").exists()
    else:
        assert list(out.glob("features/clip/c/**/*"))
        with pytest.raises(UserError, match=r"shards are missing.*lit-fast import-features"):
            open_features(open_dataset(out)).invalid_rows()
    assert imports(tmp_path / "s", out) == 0
    assert imports(tmp_path / "s", tmp_path / "whole") == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_rows_that_are_no_features_are_invalid_and_repeated_keys_left_out(tmp_path, capsys):
    want = clip_retrieval(tmp_path / "s", dtype=np.float32)
    file = tmp_path / "s/img_emb/img_emb_1.npy"
    part = np.load(file)
    part[0, 3], part[1], part[2, 0], part[3, 1] = np.nan, 0, np.inf, 3.4e38  # the last one only in bfloat16
    np.save(file, part)
    table = pq.read_table(tmp_path / "s/metadata/metadata_2.parquet").to_pydict()
    table["image_path"][1], table["image_path"][2] = "pictures/8.jpg", None
    pq.write_table(pa.table(table), tmp_path / "s/metadata/metadata_2.parquet")
    assert imports(tmp_path / "s", tmp_path / "d") == 0
    out = capsys.readouterr().out
    assert "left out 1: 1 duplicate key (pictures/8.jpg in img_emb_2.npy)" in out
    names, texts, features, invalid = stored(tmp_path / "d")
    assert names[8:] == ["pictures/8.jpg", "img_emb_2/2", "pictures/11.jpg"]
    assert texts[9] == ["a red thing number 10"]
    assert invalid == {
        3: "non-finite feature", 4: "zero feature", 5: "non-finite feature", 6: "non-finite feature"
    }  # fmt: skip
    bad = [3, 4, 5, 6]
    assert not features[bad].astype(np.float32).any()
    good = np.delete(want.astype(ml_dtypes.bfloat16), [*bad, 9], axis=0)
    np.testing.assert_array_equal(np.delete(features, bad, axis=0), good)
    assert main(["verify", str(tmp_path / "d")]) == 0


def test_train_evaluate_and_search_an_imported_dataset(tmp_path, capsys):
    clip_retrieval(tmp_path / "s", (20, 20))
    clip_retrieval(tmp_path / "e", (10,), seed=1, first=100)
    d, e, w = tmp_path / "d", tmp_path / "dev", tmp_path / "w"
    assert imports(tmp_path / "s", d) == imports(tmp_path / "e", e) == 0
    identities = [open_features(open_dataset(path)).provenance for path in (d, e)]
    assert identities[0]["identity"] != identities[1]["identity"]
    assert first_view(identities[0]) == first_view(identities[1])
    (tmp_path / "c.toml").write_text(
        'steps = 2\n[text]\nwidth = 16\ndepth = 1\nheads = 2\ndtype = "float32"\n'
        "[stream]\nglobal_batch = 8\n[optimizer]\nwarmup_steps = 1\n"
    )
    commands = [
        ["tokenize", d, "--train-vocab", 284],
        ["train", tmp_path / "c.toml", "--workdir", w, "--dataset", d],
        [
            "search",
            e,
            "a red thing",
            "--model",
            w,
            "--json",
            tmp_path / "out.json",
            "--page",
            tmp_path / "page.html",
        ],
        ["info", d],
        ["info", w],
        ["verify", d],
    ]
    for command in commands:
        assert main([str(word) for word in command]) == 0, command
    out = capsys.readouterr().out
    assert "no row was embedded again: the features were imported" in out
    assert "imported" in out
    assert len(json.loads((tmp_path / "out.json").read_text())[0]["results"]) == 10
    assert (tmp_path / "page.html").read_text().count("no picture") == 10
    for command, message in [
        (["classify", "x.jpg", "--model", w, "--labels", "a,b"], "not made by lit-fast embed"),
        (["embed", d, "--tower", "x.npz"], "imported as features and has no images"),
        (["verify", d, "--repair", "--tower", "other"], "no features of tower 'other'"),
    ]:
        assert main([str(word) for word in command]) == 2
        assert message in capsys.readouterr().err
    assert imports(tmp_path / "s", tmp_path / "other", tower="another") == 0
    capsys.readouterr()
    assert main(["search", str(tmp_path / "other"), "x", "--model", str(w)]) == 2
    assert "has no features of the run's tower clip but another" in capsys.readouterr().err


def test_verify_of_damaged_imported_features_names_the_repair(tmp_path, capsys):
    clip_retrieval(tmp_path / "s")
    assert imports(tmp_path / "s", tmp_path / "d") == 0
    features = open_features(open_dataset(tmp_path / "d"))
    data = bytearray(Path(features.shard_path(0)).read_bytes())
    data[5] ^= 1
    Path(features.shard_path(0)).write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "d")]) == 1
    shown = capsys.readouterr().out
    command = f"lit-fast import-features {tmp_path}/s --out {tmp_path}/d --tower clip --format clip-retrieval"
    assert f"delete {features.path} and finish it with: {command}" in shown
    assert main(["verify", str(tmp_path / "d"), "--repair"]) == 2
    shutil.rmtree(features.path)
    assert main(command.split()[1:]) == 0
    assert main(["verify", str(tmp_path / "d")]) == 0


def test_captions_from_a_table(tmp_path, capsys):
    clip_retrieval(tmp_path / "s", metadata=False)
    rows = [{"raw_caption": f"raw {r}", "text": f"text {r}", "key": f"k{r}"} for r in range(12)]
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for suffix in ("csv", "jsonl", "parquet"):
        table, out = tmp_path / f"t.{suffix}", tmp_path / suffix
        assert imports(tmp_path / "s", out, "--captions-table", table) == 0
        assert stored(out)[0] == [f"k{r}" for r in range(12)]
        assert stored(out)[1] == [[f"text {r}"] for r in range(12)]
        both = ["--captions-table", table, "--captions", "en=raw_caption,text"]
        assert imports(tmp_path / "s", tmp_path / f"{suffix}2", *both) == 0
        assert stored(tmp_path / f"{suffix}2")[1][5] == ["raw 5", "text 5"]
        assert "already a dataset, of other sources or options" in fails(capsys, tmp_path / "s", out)
    assert imports(tmp_path / "s", tmp_path / "none") == 0
    names, texts, _, _ = stored(tmp_path / "none")
    assert names[3] == "img_emb_1/0"
    assert not any(texts)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "text\n" + "x\n" * 11, "has 11 rows"),
        ("t.csv", "text\n" + "x\n" * 13, "has 13 rows"),
        ("t.csv", "text\n" + "x\n" * 5 + "x,y\n" + "x\n" * 6, "line 7: 2 fields"),
        ("t.jsonl", '{"text": "x"}\n' * 11 + "{\n", "line 12: line is not JSON"),
        ("t.csv", "words\n" + "x\n" * 12, "name it with --captions"),
        ("t.parquet", "PAR1", "is damaged or is not a parquet file"),
        ("t.tar", "text", "is not a table"),
        ("t.csv", "", "has 0 rows"),
    ],
)
def test_tables_that_do_not_fit_leave_nothing_behind(name, text, message, tmp_path, capsys):
    clip_retrieval(tmp_path / "s")
    (tmp_path / name).write_text(text)
    error = fails(capsys, tmp_path / "s", tmp_path / "d", "--captions-table", tmp_path / name)
    assert message in error
    assert not (tmp_path / "d").exists()


def shorter_metadata(path):
    pq.write_table(pa.table({"caption": ["x"] * 4}), path / "metadata/metadata_1.parquet")


def header(path, text, data=b""):
    text = text.ljust(118 - 1).encode() + b"\n"
    (path / "img_emb/img_emb_1.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data
    )


def npy(shape, descr="'<f2'", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shorter_metadata, r"metadata_1.parquet has 4 rows, but .*img_emb_1.npy has 5 rows"),
        (lambda p: (p / "metadata/metadata_1.parquet").unlink(), "has features but no metadata of part 1"),
        (lambda p: (p / "img_emb/img_emb_1.npy").unlink(), "has metadata but no features of part 1"),
        (lambda p: (p / "metadata/metadata_1.parquet").write_bytes(b"PAR1"), "not a parquet file"),
        (lambda p: np.save(p / "img_emb/img_emb_1.npy", np.zeros((5, 13), "f2")), "13 float16 a row"),
        (lambda p: np.save(p / "img_emb/img_emb_1.npy", np.zeros((5, 12), "f4")), "12 float32 a row"),
        (lambda p: np.save(p / "img_emb/img_emb_1.npy", np.zeros((5, 12), "i4")), "save features as floats"),
        (lambda p: np.save(p / "img_emb/img_emb_1.npy", np.zeros(5, "f2")), "save features as floats"),
        (lambda p: np.save(p / "img_emb/img_emb_1.npy", np.array([{}] * 5)), "not an .npy file of numbers"),
        (lambda p: os.truncate(p / "img_emb/img_emb_1.npy", 200), "is damaged"),
        (lambda p: os.truncate(p / "img_emb/img_emb_1.npy", 50), "is damaged"),
        (lambda p: (p / "img_emb/img_emb_1.npy").write_bytes(b"PK\3\4"), "is damaged"),
        (lambda p: header(p, npy("(1 << 60, 12)")), "is damaged"),
        (lambda p: header(p, npy("(10**18, 12)")), "is damaged"),
        (lambda p: header(p, npy("(1000000000000000000, 12)")), "is damaged"),
        (lambda p: header(p, npy("(-5, 12)"), bytes(120)), "bytes are not those of|damaged"),
        (lambda p: header(p, npy("(5, 12)"), bytes(121)), "249 bytes are not those of"),
        (lambda p: header(p, npy("(5, 0)")), "save features as floats|is damaged"),
        (lambda p: header(p, npy("(5, 12)", descr="'|O'"), bytes(480)), "not an .npy file of numbers"),
        (lambda p: header(p, "__import__('os').mkdir('made')"), "is damaged"),
        (lambda p: shutil.rmtree(p / "img_emb"), "has no img_emb/img_emb_0.npy"),
        (lambda p: shutil.copy(p / "img_emb/img_emb_1.npy", p / "img_emb/img_emb_01.npy"), "the same number"),
        (lambda p: shutil.rmtree(p), "is not a directory"),
    ],
)
def test_files_that_do_not_fit_are_named_before_anything_is_written(spoil, message, tmp_path, capsys):
    clip_retrieval(tmp_path / "s")
    spoil(tmp_path / "s")
    error = fails(capsys, tmp_path / "s", tmp_path / "d")
    assert re.search(message, error), error
    assert str(tmp_path / "s") in error
    assert not (tmp_path / "d").exists()


def test_what_is_there_already_is_not_touched(tmp_path, capsys):
    clip_retrieval(tmp_path / "s")
    assert imports(tmp_path / "s", tmp_path / "d") == 0
    before = tree(tmp_path / "d")
    clip_retrieval(tmp_path / "other", (4, 5, 4))
    assert "of other sources" in fails(capsys, tmp_path / "other", tmp_path / "d")
    x = np.load(tmp_path / "s/img_emb/img_emb_1.npy")
    np.save(tmp_path / "s/img_emb/img_emb_1.npy", -x)
    assert "have changed" in fails(capsys, tmp_path / "s", tmp_path / "d")
    assert tree(tmp_path / "d") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    assert "holds other files" in fails(capsys, tmp_path / "s", tmp_path / "full")
    assert "cannot be the name of a directory" in fails(capsys, tmp_path / "s", tmp_path / "e", tower="../x")
    zeros = tmp_path / "zeros"
    clip_retrieval(zeros, (2,))
    np.save(zeros / "img_emb/img_emb_0.npy", np.zeros((2, WIDTH), "f2"))
    assert "none of the 2 rows has a usable feature" in fails(capsys, zeros, tmp_path / "z")
    np.save(tmp_path / "empty.npy", np.zeros((0, WIDTH), "f4"))
    error = fails(capsys, tmp_path / "empty.npy", tmp_path / "y", format="npy")
    assert "no usable row in" in error
    assert "empty.npy; give at least one row of features" in error


def test_folders_of_torch_files(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    parts = [torch.randn(4, WIDTH).half() for _ in range(11)]
    source, table = tmp_path / "s", tmp_path / "t.csv"
    source.mkdir()
    shapes = [lambda x: x, list, lambda x: [x[:1], x[1:]], lambda x: {"features": x}]
    shapes.append(lambda x: {f"{i}.jpg": row for i, row in enumerate(x)})
    for number, part in enumerate(parts):
        torch.save(shapes[number % len(shapes)](part), source / f"{number}.pt")
    table.write_text("Image Path,raw_caption\n" + "".join(f"{r}.jpg,caption {r}\n" for r in range(44)))
    options = ["--captions-table", table, "--captions", "raw_caption"]
    assert imports(source, tmp_path / "d", *options, format="sail") == 0
    names, texts, features, _ = stored(tmp_path / "d")
    assert names[5] == "5.jpg"
    assert texts == [[f"caption {r}"] for r in range(44)]
    want = torch.cat(parts).float().numpy().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(features, want)

    for value, message in [
        ({"image": parts[0], "text": parts[1]}, r"several arrays \(image, text\)"),
        ([], "holds no features"),
        ([[parts[0]]], "holds no features"),
        (torch.zeros(2, 3, WIDTH), "holds no features"),
        ([parts[0]] * 30, "tensors are larger than the file"),
        ([parts[0], parts[1].float()], "vectors of widths"),
        (torch.zeros(3, 5).half(), "5 float16 a row"),
    ]:
        torch.save(value, source / "3.pt")
        error = fails(capsys, source, tmp_path / "e", format="sail")
        assert re.search(message, error), error
        assert not (tmp_path / "e").exists()
