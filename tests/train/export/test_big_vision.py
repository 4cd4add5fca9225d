"""Export for big_vision: equal parameters when read back, centring in the image head, unsupported models."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from lit_fast.config import Config, LossConfig, TextConfig
from lit_fast.errors import UserError
from lit_fast.models.two_towers import init_params, text_tower
from lit_fast.towers.tower import load_tower
from lit_fast.train.export.big_vision import arrays, check, write
from lit_fast.train.export.writer import ExportOptions
from lit_fast.utils.normalize import EPSILON
from lit_fast.weights.text_towers import read_text_weights, start_from
from tests.reference import text_tower as reference_text
from tests.trained import random_model
from tests.weights.checkpoints import write_huggingface, write_timm
from tests.weights.test_families import HUGGINGFACE, TIMM

TEXT = TextConfig(width=32, depth=2, heads=2, dtype="bfloat16")


def exported(model, folder):
    folder.mkdir()
    check(model, ExportOptions())
    write(model, str(folder), ExportOptions())
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.npz", "tokenizer.model"]
    return folder / "model.npz"


def started(file, model, text):
    """A run that begins with the text tower of the file."""
    module = text_tower(text, model.tokenizer, model.width)
    config, mean = Config(text=text, loss=model.loss), jax.ShapeDtypeStruct((model.width,), np.float32)
    shapes = jax.eval_shape(lambda mean: init_params(module, config, mean), mean)
    fresh = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    return start_from(read_text_weights(f"{file}:txt"), fresh)[0]


@pytest.mark.parametrize("pooling", ["last", "first", "mean", "max", "map"])
def test_export_read_back_gives_the_same_parameters(tiny_vit, tmp_path, pooling):
    text = replace(TEXT, pooling=pooling)
    model = random_model(load_tower(str(tiny_vit)), text, LossConfig(center=True, image_head=True))
    file = exported(model, tmp_path / "out")
    tower, params = load_tower(str(file), gelu="exact"), started(file, model, text)
    jax.tree.map(np.testing.assert_array_equal, tower.params, model.tower.params)
    for name in ("txt", "t", "b"):
        jax.tree.map(np.testing.assert_array_equal, params[name], model.params[name])


@pytest.mark.parametrize(
    "case", ["vit_base_patch16_siglip_224", "vit_large_patch16_siglip_512", "vit_base_patch16_224"]
)
def test_export_of_timm_towers_read_back_gives_the_same_tower(tmp_path, case):
    tower = load_tower(str(write_timm(tmp_path / case, TIMM[case][0], case)))
    model = random_model(tower, replace(TEXT, head=False, width=tower.width), LossConfig(name="softmax"))
    file = exported(model, tmp_path / "out")
    again = load_tower(str(file), gelu=tower.architecture.gelu)
    jax.tree.map(np.testing.assert_array_equal, again.params, tower.params)
    assert again.architecture == tower.architecture
    with np.load(file) as found:
        assert {n.split("/")[1] for n in found.files} == {"img", "txt", "t"}
        assert not any(n.startswith(("params/img/head", "params/txt/head")) for n in found.files)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("image_head", [True, False])
def test_image_head_equals_centring_and_our_head(tiny_vit, center, image_head):
    loss = LossConfig(center=center, image_head=image_head)
    model = random_model(load_tower(str(tiny_vit)), TEXT, loss)
    file = arrays(model)
    features = np.random.default_rng(1).normal(size=(20, model.width)).astype(np.float32)
    head = features.astype(np.float64)
    assert ("params/img/head/kernel" in file) == (center or image_head)
    if center or image_head:  # big_vision, models/vit.py: a dense layer; two_towers.py: normalized so
        head = head @ file["params/img/head/kernel"] + file["params/img/head/bias"]
    want = head / (np.linalg.norm(head, axis=1, keepdims=True) + EPSILON)
    # float32 against float64 over 32 products.
    np.testing.assert_allclose(model.embed_features(features), want, atol=2e-6)


def test_factorised_token_table_is_multiplied_out(tiny_vit, tmp_path):
    model = random_model(load_tower(str(tiny_vit)), replace(TEXT, embedding_width=8, dtype="float32"))
    file = exported(model, tmp_path / "out")
    params = started(file, model, TEXT)
    texts = ["a red thing", "blue"]
    exact = jax.tree.map(np.float64, params["txt"])
    raw = reference_text(model.tokenizer(texts), exact, "last")
    want = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    # The reference is float64; two layers of float32 differ by 1e-6 from it.
    np.testing.assert_allclose(model.embed_text(texts), want, atol=1e-5)
    assert "multiplied out" in (tmp_path / "out/README.md").read_text()


def test_arrays_have_big_vision_names(tiny_vit):
    """The names of its two-tower checkpoints, written down from its modules."""
    text = replace(TEXT, pooling="map")
    names = set(arrays(random_model(load_tower(str(tiny_vit)), text, LossConfig(center=True))))

    def dense(*paths):
        return {f"{path}/{leaf}" for path in paths for leaf in ("kernel", "bias")}

    def norm(*paths):
        return {f"{path}/{leaf}" for path in paths for leaf in ("scale", "bias")}

    def attention(path):
        return dense(
            *(f"{path}/MultiHeadDotProductAttention_0/{n}" for n in ("query", "key", "value", "out"))
        )

    def mlp(path):
        return dense(f"{path}/MlpBlock_0/Dense_0", f"{path}/MlpBlock_0/Dense_1")

    def encoder(path):
        blocks = [f"{path}/encoderblock_{i}" for i in range(2)]
        inside = [attention(b) | mlp(b) | norm(f"{b}/LayerNorm_0", f"{b}/LayerNorm_1") for b in blocks]
        return set().union(*inside) | norm(f"{path}/encoder_norm")

    head = "txt/MAPHead_0"
    want = {"t", "b", "img/cls", "img/pos_embedding", "txt/pos_embedding", "txt/Embed_0/embedding"}
    want |= (
        dense("img/embedding", "img/head", "txt/head") | encoder("img/Transformer") | encoder("txt/Encoder_0")
    )
    want |= {f"{head}/probe"} | attention(head) | mlp(head) | norm(f"{head}/LayerNorm_0")
    assert names == {f"params/{name}" for name in want}


CASES = {
    "vit_giant_patch14_dinov2": "no swiglu activation",
    "vit_base_patch14_reg4_dinov2": "no register tokens",
    "vit_medium_patch16_reg4_gap_256": "no LayerNorm after pooling",
    "vit_base_patch32_clip_quickgelu_224": "no LayerNorm before the first block",
    "clip_vision_model": "its image tower has no quick activation",
    "vit": "the epsilon of its LayerNorm is 1e-06, not 1e-12",
}


@pytest.mark.parametrize("case", CASES)
def test_check_unsupported_vision_tower_raises(tmp_path, case):
    timm = case in TIMM
    source = (
        write_timm(tmp_path / case, TIMM[case][0], case)
        if timm
        else write_huggingface(tmp_path / case, HUGGINGFACE[case][0], case, **HUGGINGFACE[case][4])
    )
    with pytest.raises(
        UserError, match=f"big_vision cannot express this model: .*{CASES[case]}.*--format lit_fast"
    ):
        check(random_model(load_tower(str(source)), TEXT), ExportOptions())


def test_check_masked_padding_and_unsupported_pooling_raise(tiny_vit):
    model = random_model(load_tower(str(tiny_vit), pool="gap"), replace(TEXT, mask_padding=True))
    with pytest.raises(
        UserError, match=r"text.mask_padding = true\); .* no pooling 'gap' beside a class token"
    ):
        check(model, ExportOptions())


def test_card_names_the_configuration_that_loads_the_file(tiny_vit, tmp_path):
    model = random_model(load_tower(str(tiny_vit)), TEXT, LossConfig(center=True))
    exported(model, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    for part in (
        "image=dict(width=32, depth=2, mlp_dim=128, patch_size=(8, 8), pool_type='tok', num_heads=2)",
        f"text=dict(width=32, depth=2, mlp_dim=128, vocab_size={model.tokenizer.vocab_size}, pool_type='last', num",
        "out_dim=(32, 32)", "exact one", 'tokenize(max_len=8, eos="sticky", pad_value=1',
        "--preprocess pil-crop --gelu exact --resolution 32", "computes this text tower in bfloat16",
        f"bias_init={float(model.params['b'][0])},", "`pip install flax ml_collections sentencepiece`",
    ):  # fmt: skip
        assert part in text


def test_card_without_bias_has_no_bias_init(tiny_vit, tmp_path):
    """big_vision's `load` takes any value of `bias_init`, also None, to mean that the file has a bias."""
    exported(random_model(load_tower(str(tiny_vit)), TEXT, LossConfig(name="softmax")), tmp_path / "out")
    assert "bias_init" not in (tmp_path / "out/README.md").read_text()
