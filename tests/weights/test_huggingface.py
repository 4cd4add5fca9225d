"""Towers in transformers' layout against transformers itself, on the same weights and pixels."""

import pytest

from lit_fast.towers.tower import load_tower
from tests.torch_packages import import_package
from tests.weights.families import assert_same_features, save_processor, shaken

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
}
# Real widths and heads; two layers and a coarse grid keep it cheap.
REAL = {"num_hidden_layers": 2, "image_size": 32, "patch_size": 16}
BASE = REAL | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


def vision(name, **sizes):
    transformers = import_package("transformers")
    config = getattr(transformers, f"{name}Config")(**sizes)
    # CLIPVisionConfig is also that of CLIPVisionModelWithProjection.
    return getattr(transformers, f"{name}Model")(config)


def class_token(model, x, **options):
    return model(x, **options).last_hidden_state[:, 0]


def pooled(model, x, **options):
    return model(x, **options).pooler_output


def image_embeds(model, x, **options):
    return model(x, **options).image_embeds


def with_projection(**sizes):
    transformers = import_package("transformers")
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes))


FAMILIES = {
    "vit": (lambda s: vision("ViT", **s), class_token, BASE),
    "deit": (lambda s: vision("DeiT", **s), class_token, BASE),
    "dinov2": (lambda s: vision("Dinov2", **s), class_token, BASE),
    "dinov2 giant": (
        lambda s: vision("Dinov2", use_swiglu_ffn=True, **s),
        class_token,
        REAL | {"hidden_size": 1536, "num_attention_heads": 24},
    ),
    "dinov2 with registers": (lambda s: vision("Dinov2WithRegisters", **s), class_token, BASE),
    "clip": (lambda s: vision("CLIPVision", **s), pooled, BASE),
    "clip with projection": (lambda s: with_projection(projection_dim=40, **s), image_embeds, BASE),
    "siglip": (lambda s: vision("SiglipVision", **s), pooled, BASE),
    "siglip so400m": (
        lambda s: vision("SiglipVision", **s),
        pooled,
        REAL | {"hidden_size": 1152, "num_attention_heads": 16, "intermediate_size": 4304},
    ),
}


def check(model, feature, directory, size, resolution=None, **options):
    """Features of the saved model equal the model's own."""
    model.save_pretrained(directory)
    save_processor(directory, size)
    tower = load_tower(str(directory), resolution=resolution)
    assert_same_features(tower, lambda x: feature(model, x, **options), resolution or size)


@pytest.mark.parametrize("family", FAMILIES)
def test_embed_small_models_equals_transformers(family, tmp_path):
    build, feature, _ = FAMILIES[family]
    check(shaken(build(SMALL)), feature, tmp_path, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_embed_real_widths_equals_transformers(family, tmp_path):
    build, feature, sizes = FAMILIES[family]
    check(shaken(build(sizes)), feature, tmp_path, 32)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("dinov2 giant", "siglip so400m")])
@pytest.mark.parametrize("resolution", [24, 56])
def test_embed_other_resolutions_equals_transformers(family, resolution, tmp_path):
    build, feature, _ = FAMILIES[family]
    options = {} if family.startswith("dinov2") else {"interpolate_pos_encoding": True}
    check(shaken(build(SMALL)), feature, tmp_path, 32, resolution, **options)


TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WHOLE = {
    "ViTForImageClassification": ("ViTConfig", SMALL, lambda m, x: class_token(m.vit, x)),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", SMALL, lambda m, x: class_token(m.deit, x)),
    "Dinov2ForImageClassification": ("Dinov2Config", SMALL, lambda m, x: class_token(m.dinov2, x)),
    "Dinov2WithRegistersForImageClassification": (
        "Dinov2WithRegistersConfig",
        SMALL,
        lambda m, x: class_token(m.dinov2_with_registers, x),
    ),
    "CLIPModel": (
        "CLIPConfig",
        {"vision_config": SMALL, "text_config": TEXT, "projection_dim": 20},
        lambda m, x: m.visual_projection(pooled(m.vision_model, x)),
    ),
    "SiglipModel": (
        "SiglipConfig",
        {"vision_config": SMALL, "text_config": TEXT},
        lambda m, x: pooled(m.vision_model, x),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_embed_models_in_parts_equals_transformers(name, tmp_path):
    """Classifiers and both towers, as most repositories hold them, in several files."""
    transformers = import_package("transformers")
    config, sizes, feature = WHOLE[name]
    model = shaken(getattr(transformers, name)(getattr(transformers, config)(**sizes)))
    save = model.save_pretrained
    model.save_pretrained = lambda directory: save(directory, max_shard_size="60KB")
    check(model, feature, tmp_path, 32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
