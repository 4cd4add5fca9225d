"""Vision towers against a float64 reference and against timm, on the same weights and pixels."""

import io
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_fast.demo.demo import TOWER
from lit_fast.errors import UserError
from lit_fast.towers.tower import load_tower
from tests.helpers import tiny_vit_arrays
from tests.reference import augreg_vit
from tests.torch_packages import import_package
from tests.web import Answer, own_cache, running_server  # noqa: F401


def pixels(n, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def save(path, arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_embed_equals_the_float64_reference(tiny_vit, gelu):
    tower = load_tower(str(tiny_vit), gelu=gelu)
    images = pixels(5, 32)
    got = jax.jit(tower.embed)(tower.params, images)
    want = augreg_vit(images / 127.5 - 1.0, tiny_vit_arrays(), gelu)
    # Outputs of about 1 after two float32 layers of width 32.
    np.testing.assert_allclose(got, want, atol=2e-5)
    other = augreg_vit(images / 127.5 - 1.0, tiny_vit_arrays(), {"exact": "tanh", "tanh": "exact"}[gelu])
    assert np.abs(got - other).max() > 2e-5  # the test would see the wrong GELU


def test_embed_in_bfloat16_is_close_to_float32(tiny_vit):
    tower = load_tower(str(tiny_vit))
    images = pixels(8, 32)
    embed = jax.jit(tower.embed, static_argnums=2)
    a, b = (np.asarray(embed(tower.params, images, d)) for d in (jnp.float32, jnp.bfloat16))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.999  # bfloat16 has 8 bits: relative error 0.4 % per product
    assert not np.array_equal(a, b)


def test_embed_with_real_weights_equals_timm(realdata):
    timm = import_package("timm")
    import torch

    path = str(realdata / "vit/Ti_16-augreg-i21k-i1k-224.npz")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    model.load_pretrained(path)
    model.eval()
    images = pixels(8, 224)
    with torch.no_grad():
        x = torch.tensor(images).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
        want = model.forward_features(x)[:, 0].numpy()
    tower = load_tower(path)
    got = np.asarray(jax.jit(tower.embed)(tower.params, images))
    assert np.abs(got - want).max() < 1e-4  # on features up to 15; measured 3e-5
    assert tower.preprocess.resize == 248


def test_embed_with_real_weights_equals_the_float64_reference(realdata):
    path = realdata / "vit/Ti_16-augreg-i21k-i1k-224.npz"
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files}
    images = pixels(2, 224)
    tower = load_tower(str(path))
    got = np.asarray(jax.jit(tower.embed)(tower.params, images))
    assert np.abs(got - augreg_vit(images / 127.5 - 1.0, arrays, "exact")).max() < 1e-4


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/", "params/img/"])
def test_load_tower_of_old_and_new_names_is_equal(tiny_vit, tmp_path, prefix):
    old = tiny_vit_arrays()
    want = load_tower(str(tiny_vit)).params
    new = {}
    for name, array in old.items():
        for a, b in (
            ("LayerNorm_2", "LayerNorm_1"),
            ("MlpBlock_3", "MlpBlock_0"),
            ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
        ):
            name = name.replace(a, b)
        if not name.startswith("head/"):
            new[prefix + name] = array
    positions = new.pop(prefix + "Transformer/posembed_input/pos_embedding")
    new[prefix + "pos_embedding"] = positions[:, 1:]
    new[prefix + "cls"] = new[prefix + "cls"] + positions[:, :1]
    got = load_tower(save(tmp_path / "new.npz", new)).params
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_load_tower_of_a_bucket_has_the_name_that_it_is_known_by(tiny_vit, server, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    stem = "Ti_8-i21k-1ep-lr_0.001-do_0.0"
    server.answers[f"/vit_models/augreg/{stem}.npz"] = Answer(tiny_vit.read_bytes())
    server.answers["/big_vision/tiny.npz"] = Answer(tiny_vit.read_bytes())
    assert load_tower(f"augreg/{stem}.npz").name == stem
    assert load_tower("big_vision/tiny").name == "tiny"
    known = SimpleNamespace(name="augreg/Ti_8", source=f"vit_models/augreg/{stem}.npz", sha256="")
    monkeypatch.setattr("lit_fast.weights.resolve.known_towers", lambda: (known,))
    assert load_tower("augreg/Ti_8").name == "Ti_8"


def test_load_tower_at_another_resolution_resamples_positions(tiny_vit):
    tower = load_tower(str(tiny_vit), resolution=64)
    assert tower.params["pos_embedding"].shape == (1, 64, 32)
    assert np.asarray(jax.jit(tower.embed)(tower.params, pixels(1, 64))).shape == (1, 32)


def test_identity_changes_with_everything_that_affects_features(tiny_vit, tmp_path):
    def identity(path, dtype="float32", **options):
        return load_tower(str(path), **options).provenance(dtype)["identity"]

    arrays = tiny_vit_arrays()
    arrays["cls"] = arrays["cls"] + 1e-3
    other = save(tmp_path / "tiny.npz", arrays)
    identities = [
        identity(tiny_vit),
        identity(tiny_vit, "bfloat16"),
        identity(tiny_vit, gelu="tanh"),
        identity(tiny_vit, preprocess="tf-squash"),
        identity(tiny_vit, resolution=64),
        identity(tiny_vit, pool="gap"),
        identity(other),
    ]
    assert len(set(identities)) == len(identities)
    assert identity(tiny_vit) == identities[0]


@pytest.mark.parametrize(
    ("options", "dtype", "identity"),
    [
        ({}, "bfloat16", "157374d86c92acfb173626ad71653369"),
        ({"preprocess": "tf-squash", "gelu": "tanh"}, "float32", "065823f0402acf5596c294316147d6d8"),
    ],
)
def test_identity_of_known_towers_is_unchanged(options, dtype, identity):
    """Another identity would make every stored feature of this tower useless."""
    assert load_tower(str(TOWER), **options).provenance(dtype)["identity"] == identity


def broken(change):
    arrays = tiny_vit_arrays()
    change(arrays)
    return arrays


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(lambda a: a.pop("embedding/kernel")), "no ViT, embedding/kernel is missing; give other weights"),
        (broken(lambda a: a.pop("Transformer/encoderblock_1/LayerNorm_2/bias")), "encoderblock_1/LayerNorm_1/bias"),
        (broken(lambda a: a.update({"embedding/bias": np.zeros(7)})), "embedding/bias has shape"),
        (broken(lambda a: a.update(cls=np.full((1, 1, 32), np.nan))), "cls holds values that are not finite"),
        (broken(lambda a: a.update(cls=np.array([{}], object))), "plain arrays"),
        (broken(lambda a: a.update(cls=np.array(["x"]))), "cls holds <U1, not numbers"),
    ],
)  # fmt: skip
def test_load_tower_of_unusable_weights_is_refused(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        load_tower(save(tmp_path / "bad.npz", arrays))


def test_load_tower_of_other_files_is_refused(tiny_vit, tmp_path):
    with pytest.raises(UserError, match="is neither a file nor a name"):
        load_tower(str(tmp_path / "none.npz"))
    (tmp_path / "cut.npz").write_bytes(tiny_vit.read_bytes()[:5000])
    (tmp_path / "text.npz").write_text("hello")
    for name in ("cut.npz", "text.npz"):
        with pytest.raises(UserError, match=r"not a readable \.npz"):
            load_tower(str(tmp_path / name))
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    (tmp_path / "x.npz").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        load_tower(str(tmp_path / "x.npz"))
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match="is not a regular file"):
        load_tower(str(tmp_path / "pipe.npz"))
    with pytest.raises(UserError, match="multiple of the tower's patch size"):
        load_tower(str(tiny_vit), resolution=33)
