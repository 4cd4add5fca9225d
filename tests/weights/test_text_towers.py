"""Published text towers: equal to transformers and the reference; other and damaged files are refused."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lit_fast.config import Config
from lit_fast.errors import UserError
from lit_fast.models.sizes import Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import init_params
from lit_fast.weights.text_towers import read_text_weights, start_from
from tests.reference import text_tower
from tests.torch_packages import import_package
from tests.web import running_hub  # noqa: F401
from tests.weights.families import shaken

SHAPE = Shape(width=24, depth=3, mlp_dim=40, heads=3)
VOCABULARY, LENGTH, WIDTH = 60, 8, 20
BLOCK = "Encoder_0/encoderblock/"


def tower(**options):
    given = {"shape": SHAPE, "vocab_size": VOCABULARY, "max_length": LENGTH, "out_dim": WIDTH} | options
    return TextTower(**given)


def fresh(model):
    """A run's parameters before it starts; random numbers instead of the true ones, which take a compilation."""
    shapes = jax.eval_shape(lambda: init_params(model, Config(), np.zeros(model.out_dim)))
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


@cache
def compiled(model):
    return jax.jit(lambda params, ids: model.apply({"params": params}, ids))


def drawn(model, seed=0):
    """Random arrays under big_vision's names, every one of which matters."""
    ids = jax.ShapeDtypeStruct((1, model.max_length), jnp.int32)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), ids)["params"], sep="/")
    rng = np.random.default_rng(seed)
    return {
        n: rng.normal(0, 0.2, s.shape).astype(np.float32) + n.endswith("scale") for n, s in shapes.items()
    }


def apart(arrays):
    """The blocks one by one, as in most of big_vision's files."""
    out = {n: a for n, a in arrays.items() if not n.startswith(BLOCK)}
    for name in arrays.keys() - out.keys():
        for i, array in enumerate(arrays[name]):
            out[f"Encoder_0/encoderblock_{i}/{name.removeprefix(BLOCK)}"] = array
    return out


def nested(arrays):
    tree = {}
    for name, array in arrays.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.float64(array)
    return tree


def some_ids(vocabulary=VOCABULARY, length=LENGTH):
    ids = np.random.default_rng(1).integers(2, vocabulary, (4, length))
    ids[1, 3:] = ids[2, 1:] = ids[3, :] = 1
    return ids


def embedded(model, source, ids):
    params, description = start_from(read_text_weights(str(source)), fresh(model))
    return np.asarray(compiled(model)(params["txt"], ids)), params, description


@pytest.mark.parametrize("root", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("pooling", ["last", "map"])
def test_start_from_big_vision_alone_and_beside_an_image_tower_equals_the_reference(pooling, root, tmp_path):
    model = tower(pooling=pooling)
    arrays = drawn(model)
    want = text_tower(some_ids(), nested(arrays), pooling)
    alone = {root + n: a for n, a in arrays.items()}
    both = {f"{root}txt/{n}": a for n, a in apart(arrays).items()}
    both |= {f"{root}img/cls": np.zeros((1, 1, 8)), f"{root}t": np.array([3.0]), f"{root}b": np.array([-9.0])}
    for file, suffix in ((alone, ""), (both, ""), (both, ":txt")):
        np.savez(tmp_path / "w.npz", **file)
        got, params, description = embedded(model, f"{tmp_path / 'w.npz'}{suffix}", some_ids())
        # float32 sums of three layers, outputs of about 1.
        np.testing.assert_allclose(got, want, atol=1e-4)
    assert (float(params["t"][0]), float(params["b"][0])) == (3.0, -9.0)
    assert description == "all parameters, temperature 20.09, bias -9"


def test_start_from_an_old_file_adds_positions_twice(tmp_path):
    arrays = drawn(tower())
    again = np.random.default_rng(5).normal(size=arrays["pos_embedding"].shape)
    file = {n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()}
    np.savez(tmp_path / "w.npz", **file, **{"Encoder_0/pos_embedding": again})
    rounded = nested({n: a.astype(np.float32) for n, a in file.items()})
    rounded["pos_embedding"] += again
    got, _, _ = embedded(tower(), tmp_path / "w.npz", some_ids())
    np.testing.assert_allclose(got, text_tower(some_ids(), rounded, "last"), atol=1e-4)


def save_siglip(directory: Path, arrays, prefix="", **config):
    """The arrays under transformers' names, kernels as [out, in] matrices."""
    sub = {
        "LayerNorm_0": "layer_norm1",
        "LayerNorm_1": "layer_norm2",
        "MlpBlock_0/Dense_0": "mlp.fc1",
        "MlpBlock_0/Dense_1": "mlp.fc2",
    } | {
        f"MultiHeadDotProductAttention_0/{p}": f"self_attn.{p[0] if p != 'out' else 'out'}_proj"
        for p in ("query", "key", "value", "out")
    }
    width = arrays["pos_embedding"].shape[-1]
    out = {
        f"{prefix}embeddings.token_embedding.weight": arrays["Embed_0/embedding"],
        f"{prefix}embeddings.position_embedding.weight": arrays["pos_embedding"][0],
        f"{prefix}final_layer_norm.weight": arrays["Encoder_0/encoder_norm/scale"],
        f"{prefix}final_layer_norm.bias": arrays["Encoder_0/encoder_norm/bias"],
    }
    if "head/kernel" in arrays:
        out[f"{prefix}head.weight"], out[f"{prefix}head.bias"] = (
            arrays["head/kernel"].T,
            arrays["head/bias"],
        )
    for name in (n for n in arrays if n.startswith(BLOCK)):
        module, _, leaf = name.removeprefix(BLOCK).rpartition("/")
        for i, a in enumerate(arrays[name]):
            if leaf == "kernel":
                a = a.reshape(width, -1).T if "query" in name or "key" in name or "value" in name else a
                a = a.reshape(-1, width).T if "out" in name else a.T if "Mlp" in name else a
            their = f"{prefix}encoder.layers.{i}.{sub[module]}.{'bias' if leaf == 'bias' else 'weight'}"
            out[their] = a.reshape(-1) if leaf == "bias" else a
    directory.mkdir(exist_ok=True)
    save_file({n: np.ascontiguousarray(a) for n, a in out.items()}, directory / "model.safetensors")
    config = {"model_type": "siglip_text_model", "num_attention_heads": SHAPE.heads} | config
    (directory / "config.json").write_text(json.dumps(config))


def test_start_from_siglip_equals_the_reference(tmp_path):
    arrays = drawn(tower())
    save_siglip(tmp_path, arrays)
    got, _, description = embedded(tower(), tmp_path, some_ids())
    np.testing.assert_allclose(got, text_tower(some_ids(), nested(arrays), "last"), atol=1e-4)
    assert description == "all parameters"


@pytest.mark.parametrize("spec", ["hf:owner/siglip", "owner/siglip"])
def test_read_text_weights_of_a_repository_equals_that_of_its_files(spec, hub, tmp_path):
    save_siglip(tmp_path / "siglip", drawn(tower()))
    hub.add("owner/siglip", tmp_path / "siglip")
    remote, local = read_text_weights(spec), read_text_weights(str(tmp_path / "siglip"))
    assert (remote.source, remote.sha256) == (spec, local.sha256)
    jax.tree.map(np.testing.assert_array_equal, remote.params, local.params)


SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "vocab_size": 100,
    "max_position_embeddings": 10,
    "projection_size": 20,
}
REAL = {"num_hidden_layers": 2, "vocab_size": 500}  # width, heads and length of SigLIP B
BIG = REAL | {"hidden_size": 1152, "num_attention_heads": 16, "intermediate_size": 4304}  # So400m


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("SiglipText", SMALL), ("SiglipText", REAL), ("SiglipText", BIG), ("Siglip", SMALL), ("Siglip", REAL),
        ("Siglip2Text", SMALL), ("Siglip2Text", REAL),
    ],
)  # fmt: skip
def test_start_from_siglip_equals_transformers(kind, sizes, tmp_path):
    transformers = import_package("transformers")
    import torch

    config = getattr(transformers, f"{kind}Config")
    if kind == "Siglip":
        vision = {k: v for k, v in SMALL.items() if k.startswith(("hidden", "num", "inter"))}
        whole = shaken(
            transformers.SiglipModel(
                config(text_config=sizes, vision_config=vision | {"image_size": 16, "patch_size": 8})
            )
        )
        own = whole.text_model
    else:
        whole = own = shaken(getattr(transformers, f"{kind}Model")(config(**sizes)))
    whole.save_pretrained(tmp_path)
    c = own.config
    shape = Shape(c.hidden_size, c.num_hidden_layers, c.intermediate_size, c.num_attention_heads)
    model = TextTower(shape, c.vocab_size, c.max_position_embeddings, c.projection_size)
    ids = some_ids(c.vocab_size, c.max_position_embeddings)
    got, params, _ = embedded(model, tmp_path, ids)
    with torch.no_grad():
        want = own(torch.tensor(ids)).pooler_output.numpy()
    assert want.std() > 0.1
    # Two float32 computations of a few layers whose sums run in another order, outputs of about 1 to 5.
    assert np.abs(got - want).max() < 1e-4
    if kind == "Siglip":
        np.testing.assert_array_equal(params["t"], whole.logit_scale.detach())
        np.testing.assert_array_equal(params["b"], whole.logit_bias.detach())


def save_open_clip(directory: Path, width: int = 24, bias: bool = True, **text):
    """A tiny SigLIP of open_clip; returns it and the configuration of its text tower."""
    open_clip = import_package("open_clip")
    config = {
        "context_length": LENGTH, "vocab_size": VOCABULARY, "width": width, "heads": 3, "layers": 2,
        "mlp_ratio": 2.0, "no_causal_mask": True, "proj_bias": bias, "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
    } | text  # fmt: skip
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 16}
    model = open_clip.CustomTextCLIP(WIDTH, vision, config, init_logit_bias=-10.0)
    shaken(model)
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    save_file(tensors, directory / "open_clip_model.safetensors")
    value = {"model_cfg": {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": config}}
    (directory / "open_clip_config.json").write_text(json.dumps(value))
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_start_from_open_clip_equals_open_clip(bias, tmp_path):
    model = save_open_clip(tmp_path, bias=bias)
    import torch

    ids = some_ids()
    shape = Shape(width=24, depth=2, mlp_dim=48, heads=3)
    got, params, _ = embedded(tower(shape=shape), tmp_path, ids)
    with torch.no_grad():
        want = model.encode_text(torch.tensor(ids)).numpy()
    assert want.std() > 0.1
    assert np.abs(got - want).max() < 1e-4
    np.testing.assert_array_equal(params["t"], model.logit_scale.detach().reshape(1))
    np.testing.assert_array_equal(params["b"], model.logit_bias.detach().reshape(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"no_causal_mask": False}, "a text tower with a causal mask is not supported; give one of SigLIP"),
        ({"pool_type": "argmax"}, "a text tower with pool_type 'argmax' is not supported"),
        ({"norm_kwargs": {}}, "a text tower with norm_kwargs {} is not supported"),
    ],
)
def test_read_text_weights_of_other_open_clip_models_is_refused(text, message, tmp_path):
    save_open_clip(tmp_path, **text)
    with pytest.raises(UserError, match=message):
        read_text_weights(str(tmp_path))


def test_start_from_with_shorter_tokens_takes_the_first_positions(tmp_path):
    arrays = drawn(tower())
    np.savez(tmp_path / "w.npz", **arrays)
    ids = some_ids(length=5)
    got, _, description = embedded(tower(max_length=5), tmp_path / "w.npz", ids)
    cut = nested(arrays | {"pos_embedding": arrays["pos_embedding"][:, :5]})
    np.testing.assert_allclose(got, text_tower(ids, cut, "last"), atol=1e-4)
    assert description == "all parameters, the first 5 of 8 positions"


@pytest.mark.parametrize("projected", [True, False])
def test_start_from_with_another_feature_width_keeps_the_initial_head(projected, tmp_path):
    """Temperature and bias belong to the old head's embeddings and stay fresh as well."""
    arrays = drawn(tower(out_dim=SHAPE.width, projected=projected))
    np.savez(tmp_path / "w.npz", **{f"txt/{n}": a for n, a in arrays.items()}, t=np.array([3.0]))
    new = fresh(tower(out_dim=33))
    params, description = start_from(read_text_weights(str(tmp_path / "w.npz")), new)
    assert description == "all parameters but the head"
    np.testing.assert_array_equal(params["txt"]["head"]["kernel"], new["txt"]["head"]["kernel"])
    np.testing.assert_array_equal(params["t"], new["t"])
    np.testing.assert_array_equal(params["txt"]["Embed_0"]["embedding"], arrays["Embed_0/embedding"])


def test_start_from_with_sentinel_pieces_adds_initial_rows(tmp_path):
    """mC4's vocabulary has 250 100 pieces, the towers' tables 250 000 rows."""
    arrays = drawn(tower())
    np.savez(tmp_path / "w.npz", **arrays)
    params, _ = start_from(
        read_text_weights(str(tmp_path / "w.npz")), fresh(tower(vocab_size=VOCABULARY + 100))
    )
    table = params["txt"]["Embed_0"]["embedding"]
    assert table.shape == (VOCABULARY + 100, SHAPE.width)
    np.testing.assert_array_equal(table[:VOCABULARY], arrays["Embed_0/embedding"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": Shape(48, 2, 40, 3)}, "set text.width = 24, text.depth = 3$"),
        ({"shape": SHAPE._replace(heads=4)}, "set text.heads = 3$"),
        ({"shape": SHAPE._replace(mlp_dim=41)}, "set text.mlp_dim = 40$"),
        ({"embedding_width": 8}, "set text.embedding_width = 0$"),
        ({"pooling": "map"}, 'set text.pooling = "last"$'),
        ({"projected": False, "out_dim": 24}, "set text.head = true$"),
        ({"max_length": 9}, "has 8 positions, the tokens have 9; .* --max-length 8$"),
        ({"vocab_size": 59}, "vocabulary of 60 pieces, the tokens one of 59; .* --tokenizer FILE.model$"),
        ({"vocab_size": 161}, "vocabulary of 60 pieces, the tokens one of 161"),
    ],
)
def test_start_from_another_tower_than_the_configured_one_is_refused(options, message, tmp_path):
    np.savez(tmp_path / "w.npz", **drawn(tower()))
    with pytest.raises(UserError, match=message) as error:
        embedded(tower(**options), tmp_path / "w.npz", some_ids())
    assert "\n" not in str(error.value)
    assert str(tmp_path / "w.npz") in str(error.value)


def test_start_from_a_tower_with_more_parts_is_refused(tmp_path):
    for options, message in (
        ({"pooling": "map"}, 'set text.pooling = "map"$'),
        ({"embedding_width": 8}, "set text.embedding_width = 8$"),
        ({"projected": False, "out_dim": 24}, "set text.head = false$"),
    ):
        np.savez(tmp_path / "w.npz", **drawn(tower(**options)))
        with pytest.raises(UserError, match=message):
            embedded(tower(out_dim=options.get("out_dim", WIDTH)), tmp_path / "w.npz", some_ids())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "clip"}, "model type 'clip' has no supported text tower"),
        ({"model_type": "siglip"}, "text_config is missing"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        ({"num_attention_heads": 7}, "width of 24 cannot be split into 7 heads"),
        ({"num_attention_heads": "3"}, "cannot be split into '3' heads"),
    ],
)
def test_read_text_weights_of_other_models_is_refused(config, message, tmp_path):
    save_siglip(tmp_path, drawn(tower()), **config)
    with pytest.raises(UserError, match=message):
        read_text_weights(str(tmp_path))


def test_read_text_weights_without_a_text_tower_is_refused(tmp_path, tiny_vit):
    with pytest.raises(UserError, match="Embed_0/embedding is missing"):
        read_text_weights(str(tiny_vit))
    with pytest.raises(UserError, match=r"none\.npz"):
        read_text_weights(f"{tmp_path / 'none.npz'}:txt")


def test_start_from_a_head_of_another_width_is_refused(tmp_path):
    arrays = drawn(tower()) | {"head/kernel": np.ones((1, 1), np.float32)}
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(UserError, match=r"head/kernel has shape \(1, 1\), expected \d+ rows"):
        start_from(read_text_weights(str(tmp_path / "w.npz")), fresh(tower()))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_start_from_a_damaged_file_fails_in_one_line(data, tmp_path_factory):
    """One array is missing, of another shape, not finite or doubled under another name."""
    path = tmp_path_factory.mktemp("damaged") / "w.npz"
    arrays = drawn(tower())
    arrays = apart(arrays) if data.draw(st.booleans()) else arrays
    name = data.draw(st.sampled_from(sorted(arrays)))
    array = arrays.pop(name)
    damage = data.draw(st.sampled_from(["missing", "shape", "nan", "text", "below"]))
    if damage == "shape":
        shape = data.draw(st.lists(st.integers(0, 3), max_size=5))
        arrays[name] = np.ones(shape, np.float32)
    elif damage == "nan":
        array.flat[-1] = np.nan
        arrays[name] = array
    elif damage == "text":
        arrays[name] = np.array(["x"])
    elif damage == "below":
        arrays[name], arrays[f"{name}/more"] = array, array
    np.savez(path, **arrays)
    model = tower()
    if "head/kernel" not in arrays:  # then the features' width would ask for a new one
        model = tower(out_dim=SHAPE.width)
    with pytest.raises(UserError) as error:
        start_from(read_text_weights(str(path)), fresh(model))
    assert "\n" not in str(error.value)
