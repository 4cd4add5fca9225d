"""Directories from outside that are damaged, incomplete, of other models, or made to do harm."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lit_fast.errors import UserError
from lit_fast.towers.tower import load_tower
from tests.weights.checkpoints import WIDTH, load_or_refuse, random_weights, write_huggingface, write_timm

VIT = random_weights(tokens={"cls_token": 1}, positions=1)


@pytest.fixture
def vit(tmp_path):
    return write_huggingface(tmp_path / "vit", VIT, "vit")


def change_tensors(directory, **changes):
    file = directory / "model.safetensors"
    arrays = load_file(file)
    for name, array in changes.items():
        name = name.replace("__", ".")
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array
    save_file(arrays, file)


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def refused(directory, message, **options):
    """Loading fails with one line that `message` matches."""
    with pytest.raises(UserError, match=message) as error:
        load_tower(str(directory), **options)
    assert "\n" not in str(error.value)


QUERY = "encoder__layer__0__attention__attention__query__weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layernorm__weight": None}, r"layernorm\.weight is missing"),
        ({"encoder__layer__0__output__dense__bias": None}, r"encoder\.layer\.0\.output\.dense\.bias is missing"),
        ({QUERY: np.zeros((WIDTH, 3), np.float32)}, r"query\.weight has shape \(24, 3\), the ViT needs \(24, 24\)"),
        ({QUERY: np.zeros((0, WIDTH), np.float32)}, r"query\.weight has shape \(0, 24\)"),
        ({QUERY: np.full((WIDTH, WIDTH), np.inf, np.float16)}, r"query\.weight holds values that are not finite"),
        ({QUERY: np.full((WIDTH, WIDTH), True)}, r"query\.weight holds bool, not numbers"),
        ({QUERY: np.zeros((WIDTH, WIDTH), ml_dtypes.float8_e4m3fn)}, r"query\.weight (cannot be read|holds)"),
        ({"encoder__layer__0__surprise": np.zeros(3)}, r"holds encoder\.layer\.0\.surprise, which this kind"),
        ({"encoder__layer__9__surprise": np.zeros(3)}, r"encoder\.layer\.2 is missing"),
        ({"embeddings__position_embeddings": np.zeros((1, 13, WIDTH), np.float32)}, "12 positions are not a square"),
        ({"embeddings__position_embeddings": np.zeros((1, 1, WIDTH), np.float32)}, "0 positions are not a square"),
        (
            {"embeddings__patch_embeddings__projection__weight": np.zeros((WIDTH, 3, 4, 2), np.float32)},
            "patches of 4 x 2 pixels are not square",
        ),
        ({"encoder__layer__0__intermediate__dense__weight": np.zeros((41, WIDTH), np.float32)}, "dense.bias has shape"),
        ({f"encoder__layer__{i}__output__dense__weight": np.zeros((WIDTH, 39), np.float32) for i in (0, 1)}, "Dense_"),
        ({"encoder__layer__1__output__dense__weight": np.zeros((), np.float32)}, r"dense\.weight has shape \(\)"),
    ],
)  # fmt: skip
def test_load_tower_of_other_tensors_is_refused(vit, tensors, message):
    change_tensors(vit, **tensors)
    refused(vit, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "dinov3_vit"}, "'dinov3_vit' is not supported; give ViT, DeiT, DINOv2"),
        ({"model_type": "swin"}, "'swin' is not supported"),
        ({"model_type": ["vit"]}, "is not supported"),
        ({"model_type": None}, "is not supported"),
        ({"model_type": "clip"}, "vision_config is missing"),
        ({"model_type": "siglip", "vision_config": 3}, "vision_config is missing"),
        ({"num_attention_heads": 5}, "a width of 24 cannot be split into 5 heads"),
        ({"num_attention_heads": "3"}, "cannot be split into '3' heads"),
        ({"num_attention_heads": -3}, "cannot be split into -3 heads"),
        ({"num_attention_heads": True}, "cannot be split into True heads"),
        ({"layer_norm_eps": 5}, "layer_norm_eps is 5"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"hidden_act": {}}, "hidden_act {} is not supported"),
        ({"architecture": "vit_base_patch16_dinov3", "pretrained_cfg": {}}, "vit_base_patch16_dinov3 is not supported"),
        ({"architecture": "eva02_base_patch14_224", "pretrained_cfg": {}}, "eva02_base_patch14_224 is not supported"),
        ({"architecture": 3, "pretrained_cfg": {}}, "architecture 3 is not supported"),
    ],
)  # fmt: skip
def test_load_tower_of_other_configurations_is_refused(vit, config, message):
    change_config(vit, **config)
    refused(vit, message, backend="jax")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_args": {"num_heads": 0}}, "cannot be split into 0 heads"),
        ({"model_args": {"num_heads": 7}}, "cannot be split into 7 heads"),
        ({"model_args": {"qk_norm": True}}, "the model argument qk_norm is not supported"),
        ({"model_args": [3]}, "model_args is not an object"),
        ({"model_args": {"act_layer": "relu"}}, "act_layer 'relu' is not supported; supported are gelu"),
        ({"global_pool": "avgmax"}, "global_pool 'avgmax' is not supported; supported are token"),
        ({"global_pool": "map"}, "MAPHead_0.* is missing"),
    ],
)
def test_load_tower_of_other_timm_configurations_is_refused(tmp_path, config, message):
    refused(write_timm(tmp_path / "vit", VIT, "vit_base_patch16_224", **config), message, backend="jax")


def test_load_tower_with_missing_files_is_refused(vit, tmp_path):
    refused(tmp_path, "a directory without model.safetensors, model.safetensors.index.json, open_clip_model")
    refused(tmp_path / "none", "is neither a file nor a name")
    (vit / "preprocessor_config.json").unlink()
    refused(vit, r"preprocessor_config\.json does not exist")
    (vit / "config.json").write_text("[" * 100_000)
    refused(vit, r"config\.json is damaged")
    (vit / "config.json").write_text("[]")
    refused(vit, r"config\.json is damaged: it is not a JSON object")
    (vit / "config.json").unlink()
    refused(vit, r"has no config\.json beside it; put it there, or name the architecture: --arch")
    (vit / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(vit / "pytorch_model.bin", r"is \.bin; give weights as \.npz or \.safetensors")


@pytest.mark.parametrize(
    "name", ["../vit/model.safetensors", "/etc/passwd", "a/b.safetensors", 3, "x.bin", ""]
)
def test_load_tower_of_parts_elsewhere_is_refused(vit, tmp_path, name):
    other = tmp_path / "other"
    other.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        (other / file).write_bytes((vit / file).read_bytes())
    index = other / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layernorm.weight": name}}))
    refused(other, "is not a .safetensors file beside it")
    index.write_text(json.dumps({"weight_map": {"layernorm.weight": "none.safetensors"}}))
    refused(other, r"none\.safetensors does not exist")


@settings(max_examples=30, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_load_tower_of_damaged_bytes_is_refused_or_harmless(tmp_path_factory, place, value, cut):
    directory = write_huggingface(tmp_path_factory.mktemp("damage") / "vit", VIT, "vit")
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    # Half of the examples hit the header, which is a small part of the file.
    at = int(place * len(data)) if value % 2 else int(place * 4000)
    data[at] = value
    file.write_bytes(data[:at] if cut else data)
    load_or_refuse(directory)
