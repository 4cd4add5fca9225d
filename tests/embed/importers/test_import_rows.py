"""`lit_fast.embed.import_rows`: rows of any encoder become a dataset; an interrupted import continues."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import open_features
from lit_fast.embed import import_rows
from lit_fast.embed.importers import rows as pieces
from lit_fast.errors import UserError
from tests.embed.contents import captions, keys, tree
from tests.torch_packages import import_package

WIDTH = 5
VECTORS = np.random.default_rng(0).normal(size=(100, WIDTH)).astype(np.float32)
DOCS = Path(__file__).parents[3] / "docs" / "import_features.md"


def rows(start=0, stop=100):
    for number in range(start, stop):
        yield f"k{number}", VECTORS[number], f"caption {number}"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE_ROWS", 8)


def test_rows_become_a_dataset_in_their_order(tmp_path, capsys):
    dataset = import_rows(rows(), tmp_path / "d", tower="t")
    features = open_features(dataset)
    assert keys(dataset) == [f"k{i}" for i in range(100)]
    assert captions(dataset) == [[f"caption {i}"] for i in range(100)]
    np.testing.assert_array_equal(features.read_all(), VECTORS.astype(ml_dtypes.bfloat16))
    assert not (tmp_path / "d/rows.tmp").exists()
    assert main(["verify", str(tmp_path / "d")]) == 0
    before = tree(tmp_path / "d")
    assert import_rows(rows, tmp_path / "d", tower="t") == dataset
    assert "is complete: 100 rows" in capsys.readouterr().out
    assert tree(tmp_path / "d") == before
    with pytest.raises(UserError, match="without features other"):
        import_rows(rows, tmp_path / "d", tower="other")
    with pytest.raises(UserError, match="of other sources"):
        import_rows(rows, tmp_path / "d", tower="t", source="elsewhere")


def test_vectors_of_jax_torch_and_lists_are_taken(tmp_path):
    torch = pytest.importorskip("torch")
    forms = [jnp.asarray, torch.from_numpy, np.float16, np.float64, lambda x: x.astype(float).tolist()]
    forms.append(lambda x: x.astype(ml_dtypes.bfloat16))
    given = [(i, forms[i % len(forms)](VECTORS[i]), ["a", "b", "a"]) for i in range(12)]
    dataset = import_rows(given, tmp_path / "d", tower="t", width=WIDTH)
    assert captions(dataset)[3] == ["a", "b", "a"]
    stored = open_features(dataset).read_all().astype(np.float32)
    np.testing.assert_allclose(stored, VECTORS[:12], rtol=0.01)


def test_unusable_rows_are_invalid_or_left_out_and_counted(tmp_path, capsys):
    given = [list(row) for row in rows(stop=10)]
    given[1][1] = np.zeros(WIDTH)
    given[2][1] = np.full(WIDTH, np.inf)
    given[4][0], given[5][0], given[6][0] = "k3", None, "\udc80"
    given[7][2], given[8][2] = [], None
    dataset = import_rows(given, tmp_path / "d", tower="t")
    assert keys(dataset) == ["k0", "k1", "k2", "k3", "k7", "k8", "k9"]
    assert captions(dataset)[4:6] == [[], []]
    assert open_features(dataset).invalid_rows() == {1: "zero feature", 2: "non-finite feature"}
    out = capsys.readouterr().out
    assert "left out 3: 1 no key" in out
    assert "1 duplicate key (k3" in out
    assert "5 valid, 2 invalid (1 zero feature, 1 non-finite feature)" in out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("k", VECTORS[0]), "row 3 is not a tuple of key, vector and captions"),
        ("kvc", r"row 3 is not a tuple"),
        (("k", VECTORS[0][:4], "c"), r"row 3 \('k'\) has a vector of width 4, not 5"),
        (("k", VECTORS[:2], "c"), r"has a vector of float32 \[2, 5\]"),
        (("k", [1, 2, 3, 4, 5], "c"), r"has a vector of int64 \[5\]"),
        (("k", ["a"] * 5, "c"), r"has a vector of <U1"),
        (("k", None, "c"), r"has a vector of object \[\]"),
        (("k", [[1.0], [1.0, 2.0]], "c"), "that is not an array"),
    ],
)
def test_malformed_row_is_named_and_the_rows_before_are_kept(row, message, tmp_path):
    def broken():
        yield from rows(stop=3)
        yield row

    with pytest.raises(UserError, match=message):
        import_rows(broken(), tmp_path / "d", tower="t")
    assert not (tmp_path / "d/dataset.json").exists()
    started = []

    def repaired(start):
        started.append(start)
        return rows(start)

    import_rows(repaired, tmp_path / "d", tower="t")
    assert started == [2]
    import_rows(rows, tmp_path / "whole", tower="t")
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def test_tensor_with_gradient_is_refused_with_the_remedy(tmp_path):
    torch = pytest.importorskip("torch")
    for vector in (torch.zeros(3, requires_grad=True), torch.zeros(3, dtype=torch.bfloat16)):
        with pytest.raises(UserError, match=r"give vector.detach\(\).float\(\).cpu\(\)"):
            import_rows([("k", vector, "c")], tmp_path / "d", tower="t")


@pytest.mark.parametrize("form", ["iterable", "function"])
def test_other_rows_do_not_continue_an_unfinished_import(form, tmp_path):
    with pytest.raises(UserError):
        import_rows([*rows(stop=20), None], tmp_path / "d", tower="t")

    def others(start=0):
        return (("x" + key, vector, text) for key, vector, text in rows(start))

    wrong = [others, lambda start=0: rows(start, 19), lambda start=0: ()]
    for given in wrong:
        with pytest.raises(UserError, match=r"of the unfinished import .* but is now"):
            import_rows(given if form == "function" else given(), tmp_path / "d", tower="t")
    with pytest.raises(UserError, match="rows of width 5, not 7"):
        import_rows(rows, tmp_path / "d", tower="t", width=7)
    import_rows(rows if form == "function" else rows(), tmp_path / "d", tower="t")
    assert open_dataset(tmp_path / "d").rows == 100


def test_empty_and_foreign_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match="no usable row in rows:mine"):
        import_rows([], tmp_path / "d", tower="t", source="mine")
    (tmp_path / "e").mkdir()
    (tmp_path / "e/file").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        import_rows(rows(), tmp_path / "e", tower="t")
    with pytest.raises(UserError, match="none of the 2 rows has a usable feature"):
        import_rows([("a", np.zeros(3), ""), ("b", np.zeros(3), "")], tmp_path / "z", tower="t")


@pytest.mark.parametrize("function", ["end", "write_manifest", "remove_tree"])
def test_killed_import_continues_to_the_same_bytes(function, tmp_path):
    program = f"""
import os, signal, sys
from lit_fast.embed import import_rows
from lit_fast.embed.importers import rows as pieces
from tests.embed.importers.test_import_rows import rows
pieces._PIECE_ROWS = 8
def kill(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "{function}":
        os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(kill)
import_rows(rows, sys.argv[1], tower="t")
"""
    path = os.pathsep.join([str(DOCS.parents[1]), *sys.path])
    command = [sys.executable, "-c", program, str(tmp_path / "d")]
    done = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "d/rows.tmp").exists()
    import_rows(rows, tmp_path / "d", tower="t")
    import_rows(rows(), tmp_path / "whole", tower="t")
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)


def test_example_of_the_documentation_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], {"__name__": "__main__"})
    (tmp_path / "small.toml").write_text(
        'steps = 2\n[text]\nwidth = 16\ndepth = 1\nheads = 2\ndtype = "float32"\n'
        "[stream]\nglobal_batch = 8\n[optimizer]\nwarmup_steps = 1\n"
    )
    lines = next(block for block in blocks("sh") if "lit-fast train" in block).splitlines()
    for line in lines:
        assert main(line.replace("siglit_b8_one_day", "small.toml").split()[1:]) == 0, line
    assert (tmp_path / "runs/projected/receipt.json").exists()


def test_example_with_timm_makes_its_features(tmp_path, monkeypatch):
    timm = import_package("timm")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 30), (50 * number, 90, 10)).save(tmp_path / f"photos/{number}.jpg")
        (tmp_path / f"photos/{number}.txt").write_text(f"a colour {number}")
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, **options: create("vit_tiny_patch16_224", **options | {"pretrained": False}),
    )
    exec(blocks("python")[1], {"__name__": "__main__"})
    dataset = open_dataset(tmp_path / "photos_dataset")
    assert dataset.rows == 5
    assert captions(dataset)[4] == ["a colour 4"]
    assert open_features(dataset).width == 192
