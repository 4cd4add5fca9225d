"""big_vision's and AugReg's `.npz` in all their layouts, and files made to do harm."""

import io
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.errors import UserError
from lit_fast.towers.tower import load_tower
from tests.helpers import tiny_vit_arrays
from tests.reference import torch_vit
from tests.weights.checkpoints import HEADS, SIZE, load_or_refuse, random_weights, write_npz
from tests.weights.families import pixels

MAP = random_weights(head="map")


def features(tower):
    return np.asarray(jax.jit(tower.embed)(tower.params, pixels(3, SIZE)))


def test_embed_with_a_map_head_equals_the_float64_reference(tmp_path):
    tower = load_tower(str(write_npz(tmp_path / "map.npz", MAP)))
    assert (tower.architecture.pool, tower.architecture.gelu) == ("map", "tanh")
    assert (tower.preprocess.method, tower.preprocess.size) == ("tf-squash", SIZE)
    want = torch_vit(pixels(3, SIZE) / 127.5 - 1, MAP, HEADS, "tanh", 1e-6, "map")
    # Two float32 layers, outputs of about 1 to 3.
    np.testing.assert_allclose(features(tower), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("prefix", ["", "params/img/", "img/"])
def test_load_npz_of_every_layout_gives_the_same_parameters(tmp_path, old, stacked, prefix):
    want = load_tower(str(write_npz(tmp_path / "new.npz", MAP))).params
    path = write_npz(tmp_path / "map.npz", MAP, old=old, stacked=stacked, prefix=prefix)
    jax.tree.map(np.testing.assert_array_equal, load_tower(str(path)).params, want)


def test_load_tower_with_mean_pooling_leaves_the_map_head_out(tmp_path):
    path = str(write_npz(tmp_path / "map.npz", MAP))
    tower = load_tower(path, pool="gap", gelu="exact")
    want = torch_vit(pixels(3, SIZE) / 127.5 - 1, MAP, HEADS, "exact", 1e-6, "gap")
    np.testing.assert_allclose(features(tower), want, rtol=0, atol=2e-5)
    assert tower.preprocess == load_tower(path).preprocess
    with pytest.raises(
        UserError, match=r"pool 'tok' does not fit the weights of .*map\.npz; choose from gap, map"
    ):
        load_tower(path, pool="tok")


def test_load_npz_of_a_training_checkpoint_takes_the_image_tower(tmp_path):
    with np.load(write_npz(tmp_path / "float32.npz", MAP, prefix="params/img/")) as file:
        arrays = {n: file[n].astype(ml_dtypes.bfloat16) for n in file.files}
    want = {n: a.astype(np.float32) for n, a in arrays.items()}
    further = {
        "params/txt/Embed_0/embedding": np.full((3, 2), np.nan),
        "params/t": np.zeros(1),
        "params/img/head/kernel": np.zeros((2, 2)),
        "opt/0/mu/img/cls": np.zeros(3),
    }
    np.savez(tmp_path / "bfloat16.npz", **arrays, **further)  # numpy writes bfloat16 as two opaque bytes
    np.savez(tmp_path / "rounded.npz", **want)
    got, want = (load_tower(str(tmp_path / f"{name}.npz")).params for name in ("bfloat16", "rounded"))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def changed(**changes):
    arrays = tiny_vit_arrays()
    for name, array in changes.items():
        name = name.replace("__", "/")
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array
    return arrays


QUERY = "Transformer__encoderblock_{}__MultiHeadDotProductAttention_1__query__kernel"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (changed(embedding__kernel=np.float32(3)), r"embedding/kernel has shape \(\)"),
        (changed(embedding__kernel=np.zeros((0, 0, 3, 32))), "embedding/kernel is empty"),
        (changed(embedding__kernel=np.zeros((8, 8, 4, 32))), "embedding/kernel has shape"),
        (changed(embedding__kernel=np.zeros((8, 8, 3, 7))), "cannot be split into 2 heads"),
        (changed(cls=np.zeros((1, 1, 7))), r"cls has shape \(1, 1, 7\)"),
        (changed(cls=np.zeros((500, 32, 1))), "cls has shape"),
        (changed(cls__deeper=np.zeros(3)), "cls/deeper"),
        (changed(Transformer=np.zeros(3)), "Transformer"),
        (changed(Transformer__encoder_norm=np.zeros(3)), "encoder_norm"),
        (changed(Transformer__posembed_input__pos_embedding=np.zeros((1, 12, 32))), "not a square grid"),
        (changed(Transformer__posembed_input__pos_embedding=np.zeros(5)), "pos_embedding has shape"),
        (changed(Transformer__posembed_input__pos_embedding=None), "pos_embedding is missing"),
        (changed(pos_embedding=np.zeros((1, 17, 32))), "are the same array"),
        (changed(Transformer__encoderblock_7__LayerNorm_0__bias=np.zeros(32)), "encoderblock_2/.* is missing"),
        (changed(**{QUERY.format(1): np.zeros((32, 4, 8))}), "does not have the same shape in every block"),
        (changed(**{QUERY.format(i): np.zeros((32, 3, 8)) for i in (0, 1)}), "3 heads"),
        (changed(**{QUERY.format(i): np.zeros(32) for i in (0, 1)}), "encoder blocks"),
        (changed(conv_root__kernel=np.zeros((7, 7, 3, 64))), "conv_root/kernel, which this kind of ViT does not have"),
        (changed(embedding__bias=np.full(32, 1e300)), "not finite"),
        (changed(embedding__bias=np.zeros(32, complex)), "complex128, not numbers"),
        (changed(embedding__bias=np.zeros(32, [("a", "f4")])), "not numbers"),
    ],
)  # fmt: skip
def test_load_npz_of_other_contents_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        load_tower(str(tmp_path / "bad.npz"))
    assert "bad.npz" in str(error.value)
    assert "\n" not in str(error.value)


def member(header, data=b""):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        member("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}", b"abcd"),
        member("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4)}", b"abcd"),
        member("{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}", b"abcd"),
        member("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem\n(S'true'\ntR."),
        member("{'descr': '<f4', 'shape': (1,)}", b"abcd"),
        member("[" * 100),
        b"\x93NUMPY\x07\x00",
        b"",
    ],
)
def test_open_npz_of_false_headers_is_refused(tmp_path, data):
    """Nothing of the claimed size is allocated: a terabyte would fail."""
    buffer = io.BytesIO()
    np.savez(buffer, **changed(embedding__bias=None))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("embedding/bias.npy", data)
    (tmp_path / "bad.npz").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"bad\.npz: not a readable \.npz of plain arrays"):
        load_tower(str(tmp_path / "bad.npz"))


def test_open_npz_of_a_decompression_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = member("{'descr': '<f4', 'fortran_order': False, 'shape': (50000000,)}")
        archive.writestr("embedding/kernel.npy", header + bytes(200_000_000))
    assert (tmp_path / "bomb.npz").stat().st_size < 1_000_000
    with pytest.raises(UserError, match=r"unpacks to 0\.2 GiB and is refused"):
        load_tower(str(tmp_path / "bomb.npz"))


@settings(max_examples=30, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_load_npz_of_damaged_bytes_is_refused_or_harmless(tiny_vit, tmp_path_factory, place, value, cut):
    data = bytearray(tiny_vit.read_bytes())
    at = int(place * len(data))
    data[at] = value
    path = tmp_path_factory.mktemp("damage") / "x.npz"
    path.write_bytes(data[:at] if cut else data)
    load_or_refuse(path)


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        (10**9, r"resolution must be between 1 and 4096 pixels, not 1000000000$"),
        (-8, r"resolution must be between 1 and 4096 pixels, not -8$"),
        (0, r"resolution must be between 1 and 4096 pixels, not 0$"),
        (33, r"resolution 33 is not a multiple of the tower's patch size 8; use a multiple$"),
    ],
)
def test_load_tower_of_an_absurd_resolution_is_refused(tiny_vit, resolution, message):
    with pytest.raises(UserError, match=message):
        load_tower(str(tiny_vit), resolution=resolution)
