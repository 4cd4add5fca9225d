"""Every family from small checkpoints in every naming, against a float64 reference."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lit_fast.errors import UserError
from lit_fast.towers.tower import load_tower
from tests.reference import torch_vit
from tests.web import running_hub  # noqa: F401
from tests.weights.checkpoints import HEADS, SIZE, WIDTH, random_weights, write_huggingface, write_timm
from tests.weights.families import pixels

CLS = {"cls_token": 1}
# Weights, the non-linearity, epsilon and pooling that the family has, and how the file says so.
HUGGINGFACE = {
    "vit": (random_weights(tokens=CLS, positions=1), "exact", 1e-12, "tok", {}),
    "vit in a classifier": (
        random_weights(tokens=CLS, positions=1), "tanh", 1e-6, "tok",
        {"prefix": "vit.", "hidden_act": "gelu_new", "layer_norm_eps": 1e-6},
    ),
    "vit without bias": (
        random_weights(tokens=CLS, positions=1, qkv_bias=False), "exact", 1e-12, "tok", {"qkv_bias": False},
    ),
    "deit": (random_weights(tokens=CLS | {"dist_token": 1}, positions=2), "exact", 1e-12, "tok", {}),
    "dinov2": (random_weights(tokens=CLS, positions=1, scale=True), "exact", 1e-6, "tok", {}),
    "dinov2_with_registers": (
        random_weights(tokens=CLS | {"reg_token": 4}, positions=1, scale=True), "exact", 1e-6, "tok", {},
    ),
    "clip_vision_model": (
        random_weights(tokens=CLS, positions=1, pre_norm=True, head="projection"), "quick", 1e-5, "projection", {},
    ),
    "clip_vision_model alone": (
        random_weights(tokens=CLS, positions=1, pre_norm=True), "exact", 1e-5, "tok", {"hidden_act": "gelu"},
    ),
    "siglip_vision_model": (random_weights(head="map"), "tanh", 1e-6, "map", {}),
}  # fmt: skip
TIMM = {
    "vit_base_patch16_224": (random_weights(tokens=CLS, positions=1), "exact", 1e-6, "tok"),
    "deit_base_distilled_patch16_224": (
        random_weights(tokens=CLS | {"dist_token": 1}, positions=2), "exact", 1e-6, "tok",
    ),
    "deit3_base_patch16_224": (random_weights(tokens=CLS, scale=True), "exact", 1e-6, "tok"),
    "vit_giant_patch14_dinov2": (
        random_weights(tokens=CLS, positions=1, scale=True, swiglu=True), "swiglu", 1e-6, "tok",
    ),
    "vit_base_patch14_reg4_dinov2": (
        random_weights(tokens=CLS | {"reg_token": 4}, scale=True), "exact", 1e-6, "tok",
    ),
    "vit_medium_patch16_reg4_gap_256": (
        random_weights(tokens={"reg_token": 4}, late_norm=True, qkv_bias=False), "exact", 1e-6, "gap",
    ),
    "vit_base_patch16_siglip_224": (random_weights(head="map"), "exact", 1e-6, "map"),
    "vit_large_patch16_siglip_512": (random_weights(head="map"), "tanh", 1e-6, "map"),
    "vit_base_patch32_clip_quickgelu_224": (
        random_weights(tokens=CLS, positions=1, pre_norm=True, head="projection"), "quick", 1e-5, "projection",
    ),
}  # fmt: skip


def check(tower, weights, gelu, epsilon, pool):
    images = pixels(3, SIZE)
    got = np.asarray(jax.jit(tower.embed)(tower.params, images))
    want = torch_vit(images / 127.5 - 1, weights, HEADS, gelu, epsilon, pool)
    assert got.shape == want.shape == (3, tower.width)
    # Two float32 layers, outputs of about 1 to 3: measured at most 3e-6.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    return got


@pytest.mark.parametrize("case", HUGGINGFACE)
def test_load_tower_of_transformers_equals_the_reference(case, tmp_path):
    weights, gelu, epsilon, pool, config = HUGGINGFACE[case]
    tower = load_tower(str(write_huggingface(tmp_path / "tower", weights, case.split()[0], **config)))
    assert (tower.name, tower.architecture.gelu, tower.architecture.pool) == ("tower", gelu, pool)
    check(tower, weights, gelu, epsilon, pool)


@pytest.mark.parametrize("name", TIMM)
def test_load_tower_of_timm_equals_the_reference(name, tmp_path):
    weights, gelu, epsilon, pool = TIMM[name]
    tower = load_tower(str(write_timm(tmp_path / "tower", weights, name)))
    assert (tower.architecture.gelu, tower.architecture.pool) == (gelu, pool)
    check(tower, weights, gelu, epsilon, pool)


@pytest.mark.parametrize("pool", ["tok", "gap"])
def test_load_tower_with_a_pooling_uses_it_or_refuses(pool, tmp_path):
    weights, gelu, epsilon, _, _ = HUGGINGFACE["clip_vision_model"]
    path = str(write_huggingface(tmp_path / "clip", weights, "clip_vision_model"))
    tower = load_tower(path, pool=pool)
    assert tower.width == WIDTH
    check(tower, weights, gelu, epsilon, pool)
    with pytest.raises(
        UserError, match=r"pool 'map' does not fit the weights of .*clip.*; choose from tok, gap, projection"
    ):
        load_tower(path, pool="map")


def test_embed_in_bfloat16_is_close_to_float32(tmp_path):
    name = "vit_base_patch16_siglip_224"
    tower = load_tower(str(write_timm(tmp_path / "tower", TIMM[name][0], name)))
    images = pixels(8, SIZE)
    embed = jax.jit(tower.embed, static_argnums=2)
    a, b = (np.asarray(embed(tower.params, images, d)) for d in (np.float32, ml_dtypes.bfloat16))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.995  # 8 bits in every product of two layers with large random weights
    assert a.dtype == b.dtype == np.float32
    assert not np.array_equal(a, b)


def test_load_tower_of_a_file_with_two_towers_takes_the_vision_tower(tmp_path):
    """A CLIP with its text tower, in halves of precision and in parts."""
    weights, gelu, epsilon, pool, _ = HUGGINGFACE["clip_vision_model"]
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}
    directory = write_huggingface(tmp_path / "clip", halves, "clip_vision_model")
    vision = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    arrays = load_file(directory / "model.safetensors")
    arrays |= {
        "text_model.embeddings.token_embedding.weight": np.full(
            (5, 4), np.nan, np.float32
        ),  # not ours to read
        "vision_model.embeddings.position_ids": np.arange(17)[None],
        "text_projection.weight": np.zeros((4, 4), np.float32),
        "logit_scale": np.array(4.6, np.float32),
    }
    save_file(arrays, directory / "model.safetensors")
    whole = load_tower(str(directory))
    rounded = {name: array.astype(np.float32) for name, array in halves.items()}
    features = check(whole, rounded, gelu, epsilon, pool)

    shutil.copytree(directory, tmp_path / "parts")
    (tmp_path / "parts/model.safetensors").unlink()
    names = sorted(arrays)
    table = {n: f"model-{1 + (i % 2)}-of-2.safetensors" for i, n in enumerate(names)}
    for part in set(table.values()):
        save_file({n: arrays[n] for n in names if table[n] == part}, tmp_path / "parts" / part)
    index = tmp_path / "parts/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    for spec in (tmp_path / "parts", index):
        tower = load_tower(str(spec))
        np.testing.assert_array_equal(jax.jit(tower.embed)(tower.params, pixels(3, SIZE)), features)
    assert tower.sha256 != whole.sha256


@pytest.mark.parametrize("spec", ["hf:owner/vit", "owner/vit@v1"])
def test_load_tower_of_a_repository_equals_that_of_its_files(spec, hub, tmp_path):
    directory = write_huggingface(tmp_path / "dinov2", HUGGINGFACE["dinov2"][0], "dinov2")
    hub.add("owner/vit", directory)
    tower, local = load_tower(spec), load_tower(str(directory))
    assert tower.provenance("float32")["identity"] == local.provenance("float32")["identity"]
    assert (tower.source, tower.name) == (spec, spec.removeprefix("hf:").replace("/", "-").replace("@", "-"))


def test_load_tower_of_a_file_reads_the_configuration_beside_it(tmp_path):
    weights, *rest, _ = HUGGINGFACE["dinov2"]
    directory = write_huggingface(tmp_path / "dinov2", weights, "dinov2")
    tower = load_tower(str(directory / "model.safetensors"))
    check(tower, weights, *rest)
    assert tower.source == str(directory / "model.safetensors")
    assert (
        tower.provenance("float32")["identity"]
        == load_tower(str(directory)).provenance("float32")["identity"]
    )
