"""Towers in timm's layout against timm itself, on the same weights and pixels."""

import jax
import numpy as np
import pytest

from lit_fast.towers.tower import load_tower
from lit_fast.weights.timm import epsilon_of, gelu_of, heads_of, supported
from tests.torch_packages import import_package
from tests.weights.families import assert_same_features, shaken

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 32, "patch_size": 8}
REAL = {"depth": 2, "img_size": 32, "patch_size": 16}


def own_feature(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


def class_token(model, x):  # the distilled models' own feature is the mean of two tokens
    return model.forward_features(x)[:, 0]


def embedding(model, x):
    return model(x)


NAMES = {
    "vit_base_patch16_224": own_feature,
    "vit_huge_patch14_224": own_feature,
    "vit_base_patch16_224_miil": own_feature,  # no query, key, value bias
    "vit_medium_patch16_gap_256": own_feature,  # mean after the norm, LayerScale
    "vit_base_patch16_reg4_gap_256": own_feature,  # registers, norm after the mean
    "vit_so150m_patch16_reg4_map_256": own_feature,  # registers with positions, MAP head
    "deit_base_patch16_224": own_feature,
    "deit_base_distilled_patch16_224": class_token,
    "deit3_base_patch16_224": own_feature,
    "vit_base_patch14_dinov2": own_feature,
    "vit_giant_patch14_dinov2": own_feature,
    "vit_base_patch14_reg4_dinov2": own_feature,
    "vit_base_patch32_clip_224": own_feature,
    "vit_base_patch16_clip_quickgelu_224": embedding,
    "vit_base_patch16_siglip_224": own_feature,
    "vit_so400m_patch16_siglip_256": own_feature,
    "flexivit_small": own_feature,
}


def build(name, **sizes):
    timm = import_package("timm")
    # With 0 classes there is no head; CLIP's projection is a head without bias.
    classes = 24 if NAMES[name] is embedding else 0
    model = shaken(timm.create_model(name, num_classes=classes, **sizes))
    if classes:
        model.head.bias.data.zero_()
    return model


def check(name, model, directory, **options):
    timm = import_package("timm")
    config = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    timm.models.save_for_hf(model, directory, data_config=config, safe_serialization=True)
    tower = load_tower(str(directory), **options)
    if "resolution" in options:
        model.set_input_size(options["resolution"])
    assert_same_features(tower, lambda x: NAMES[name](model, x), tower.preprocess.size)
    return tower


@pytest.mark.parametrize("name", NAMES)
def test_embed_small_models_equals_timm(name, tmp_path):
    tower = check(name, build(name, **SMALL), tmp_path)
    assert tower.preprocess.size == 32


@pytest.mark.parametrize("name", NAMES)
def test_embed_real_widths_equals_timm(name, tmp_path):
    check(name, build(name, **REAL), tmp_path)


@pytest.mark.parametrize("resolution", [24, 64])
@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_224", "deit_base_distilled_patch16_224", "vit_base_patch14_reg4_dinov2",
     "vit_so150m_patch16_reg4_map_256", "vit_base_patch16_siglip_224"],
)  # fmt: skip
def test_embed_other_resolutions_equals_timm(name, resolution, tmp_path):
    check(name, build(name, **SMALL), tmp_path, resolution=resolution)


def test_load_tower_real_weights_equal_those_of_the_npz(realdata, tmp_path):
    """The same weights as an AugReg file and as timm writes them: one function."""
    timm = import_package("timm")
    file = str(realdata / "vit/Ti_16-augreg-i21k-i1k-224.npz")
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    model.load_pretrained(file)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    a, b = load_tower(file), load_tower(str(tmp_path))
    assert a.preprocess == b.preprocess
    assert a.architecture == b.architecture
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_supported_names_have_the_heads_and_epsilon_of_timm():
    """Heads, non-linearity and epsilon, which have no tensors, for all of timm's models."""
    timm = import_package("timm")
    import torch
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    activations = {"GELU": "exact", "GELUTanh": "tanh", "QuickGELU": "quick"}
    names = [name for name in timm.list_models() if supported(name)]
    assert len(names) > 100
    for name in names:
        with torch.device("meta"):  # nothing is allocated
            model = timm.create_model(name)
        block = model.blocks[0]
        assert type(model) in (VisionTransformer, VisionTransformerDistilled), name
        assert (type(block), type(block.attn)) == (Block, Attention), name
        assert (type(block.norm1).__name__, block.norm1.eps) == ("LayerNorm", epsilon_of(name)), name
        assert block.attn.num_heads == heads_of(name, model.embed_dim), name
        if type(block.mlp).__name__ != "GluMlp":
            assert activations[type(block.mlp.act).__name__] == gelu_of(name), name
        assert not model.pool_include_prefix, name
