"""Models of other libraries under JAX against the same models in eager PyTorch."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_fast.towers.tower import load_tower
from tests.torch_packages import import_package
from tests.towers.torch.models import (
    SIZE,
    TIMM,
    TRANSFORMERS,
    compiled,
    eager,
    save,
    save_open_clip,
    save_timm,
)
from tests.weights.families import pixels

CASES = (
    [f"timm:{name}" for name in TIMM] + ["open_clip:vit"] + [f"transformers:{name}" for name in TRANSFORMERS]
)

# The sums of a product are of at most a thousand float32 terms in another order: 1e-7 each.
FLOAT32 = 3e-6


@pytest.fixture(autouse=True)
def _packages() -> None:
    import_package("timm")
    pytest.importorskip("torchax")


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_embed_float32_equals_eager_torch(case: str, tmp_path: Path) -> None:
    model = save(tmp_path, case)
    tower = load_tower(str(tmp_path), backend="torch")
    images = pixels(3, SIZE)
    found = compiled(tower, images)
    assert found.shape == (3, tower.width)
    assert found.dtype == np.float32
    assert difference(found, eager(tower, model, images)) < FLOAT32


@pytest.mark.parametrize("case", ["timm:convnext", "timm:eva02", "timm:resnet"])
def test_embed_bfloat16_rounds_products_only(case: str, tmp_path: Path) -> None:
    model = save(tmp_path, case)
    tower = load_tower(str(tmp_path), backend="torch")
    images = pixels(3, SIZE)
    half = jax.jit(lambda params, x: tower.embed(params, x, jnp.bfloat16))
    found, expected = compiled(tower, images, jnp.bfloat16), eager(tower, model, images)
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.9995
    program = half.lower(tower.params, images).as_text()
    products = [
        line for line in program.splitlines() if "dot_general" in line or "stablehlo.convolution" in line
    ]
    halved = [line for line in products if "bf16" in line]
    assert len(halved) >= 0.9 * len(products) > 0
    assert any(
        "exponential" in line or "rsqrt" in line for line in program.splitlines() if "f32" in line
    ) or (case == "timm:resnet")
    assert all(np.asarray(value).dtype != jnp.bfloat16 for value in tower.params.values())


@pytest.mark.parametrize("case", ["timm:tiny_vit", "transformers:dinov3_vit"])
def test_embed_of_a_model_that_keeps_tensors_can_be_traced_again(case: str, tmp_path: Path) -> None:
    model = save(tmp_path, case)
    tower = load_tower(str(tmp_path))
    for count, dtype in ((1, jnp.float32), (2, jnp.bfloat16)):
        images = pixels(count, SIZE)
        jax.make_jaxpr(lambda params, x, dtype=dtype: tower.embed(params, x, dtype))(tower.params, images)
    images = pixels(3, SIZE)
    assert difference(compiled(tower, images), eager(tower, model, images)) < FLOAT32


def test_program_has_no_host_callback_and_no_weights_in_it(tmp_path: Path) -> None:
    save_timm(tmp_path, "swinv2")
    tower = load_tower(str(tmp_path))
    program = jax.jit(tower.embed).lower(tower.params, pixels(2, SIZE)).as_text()
    assert "callback" not in program
    assert len(program) < 400_000


@pytest.mark.parametrize("family", ["eva02", "convnext"])
def test_resolution_changes_where_the_architecture_allows(family: str, tmp_path: Path) -> None:
    timm = import_package("timm")
    model = save_timm(tmp_path, family)
    tower = load_tower(str(tmp_path), resolution=48)
    assert tower.preprocess.size == 48
    if family == "eva02":
        name, arguments = TIMM[family]
        larger = timm.create_model(name, num_classes=0, **arguments | {"img_size": 48}).eval()
        from timm.models.eva import checkpoint_filter_fn

        larger.load_state_dict(checkpoint_filter_fn(model.state_dict(), larger))
        model = larger
    images = pixels(2, 48)
    found = compiled(tower, images)
    assert difference(found, eager(tower, model, images)) < FLOAT32


@pytest.mark.parametrize("pool", ["tok", "gap"])
def test_pool_replaces_that_of_the_model(pool: str, tmp_path: Path) -> None:
    model = save_timm(tmp_path, "dinov3")
    tower = load_tower(str(tmp_path), pool=pool)
    images = pixels(2, SIZE)
    model.reset_classifier(0, global_pool={"tok": "token", "gap": "avg"}[pool])
    found = compiled(tower, images)
    assert difference(found, eager(tower, model, images)) < FLOAT32


def test_pool_of_clip_in_timm_is_the_projection(tmp_path: Path) -> None:
    model = save_timm(tmp_path, "pe", num_classes=24)
    model.head.bias.zero_()
    import_package("timm").models.save_for_hf(model, tmp_path, safe_serialization=True)
    tower = load_tower(str(tmp_path))
    assert tower.width == 24
    assert tower.provenance("float32")["pool"] == "projection"
    images = pixels(2, SIZE)
    assert difference(compiled(tower, images), eager(tower, model, images)) < FLOAT32
    assert load_tower(str(tmp_path), pool="tok" if model.cls_token is not None else "gap").width == 48


@pytest.mark.parametrize("pool", ["tok", "gap", "projection"])
def test_pool_of_open_clip(pool: str, tmp_path: Path) -> None:
    visual = save_open_clip(tmp_path)
    tower = load_tower(str(tmp_path), pool=pool)
    if pool != "projection":
        visual.proj, visual.pool_type = None, {"tok": "tok", "gap": "avg"}[pool]
    images = pixels(2, SIZE)
    assert difference(compiled(tower, images), eager(tower, visual, images)) < FLOAT32


def test_architecture_of_a_plain_vit_takes_the_own_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    timm = import_package("timm")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    assert (
        load_tower(str(tmp_path / "w.safetensors"), arch="test_vit").provenance("float32")["model"]
        == "test_vit"
    )
    network = timm.create_model("vit_tiny_patch16_224")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    tower = load_tower(str(tmp_path / "w.safetensors"), arch="vit_tiny_patch16_224")
    assert tower.provenance("float32")["architecture"] == "vit"
    assert (tower.name, tower.preprocess.mean, tower.preprocess.resize) == ("w", (0.5,) * 3, 248)


def test_own_model_and_torch_agree(tmp_path: Path, tiny_vit: Path) -> None:
    """A ViT of big_vision's layout by both, at its own resolution."""
    own, other = load_tower(str(tiny_vit)), load_tower(str(tiny_vit), backend="torch")
    images = pixels(3, own.preprocess.size)
    found, expected = (compiled(t, images) for t in (other, own))
    assert difference(found, expected) < 1e-5
    assert other.provenance("float32")["identity"] != own.provenance("float32")["identity"]
    assert own.preprocess == other.preprocess


def test_own_model_and_torch_agree_on_real_weights(realdata: Path) -> None:
    path = realdata / "vit" / "Ti_16-augreg-i21k-i1k-224.npz"
    own, other = load_tower(str(path)), load_tower(str(path), backend="torch")
    images = pixels(2, 224)
    found, expected = (compiled(t, images) for t in (other, own))
    assert difference(found, expected) < 1e-5


def test_real_efficientnet_equals_eager_torch(realdata: Path) -> None:
    path = realdata / "towers" / "tf_efficientnet_lite0.safetensors"
    if not path.is_file():
        pytest.skip("no such weights here")
    tower = load_tower(str(path), arch="tf_efficientnet_lite0")
    assert (tower.name, tower.width) == ("tf_efficientnet_lite0", 1280)
    assert (tower.preprocess.size, tower.preprocess.resize, tower.preprocess.mean) == (
        224,
        256,
        (0.5, 0.5, 0.5),
    )
    timm = import_package("timm")
    from safetensors.torch import load_file

    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(path))
    model.reset_classifier(0)
    images = pixels(2, 224)
    assert difference(compiled(tower, images), eager(tower, model, images)) < FLOAT32
