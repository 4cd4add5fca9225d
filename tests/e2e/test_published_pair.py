"""Both towers from a published SigLIP: a run starts with its function and is exported with its own."""

import jax
import numpy as np
import pytest

import lit_fast
from lit_fast import api
from lit_fast.config_io import load_config
from lit_fast.runs.run import open_run
from tests.helpers import picture, samples, write_tar
from tests.torch_packages import import_package
from tests.train.export.test_transformers import loaded_by_transformers
from tests.trained import command
from tests.weights.families import normalized, save_processor, shaken

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXTS = ["picture 3, caption 1", "Another caption", ""]
SHAPE = ("--text.width=32", "--text.depth=2", "--text.mlp_dim=64", "--text.heads=2", "--text.dtype=float32")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A dataset d, and the folder `siglip` of a random pair of 32 pixels, written by transformers."""
    transformers = import_package("transformers")
    path = tmp_path_factory.mktemp("pair")
    api.index(write_tar(path / "pairs.tar", samples(24)), out=path / "d")
    api.tokenize(path / "d", train_vocab=284, name="words", max_length=12)
    text = SIZES | {"vocab_size": 284, "max_position_embeddings": 12, "projection_size": 32}
    vision = SIZES | {"image_size": 32, "patch_size": 8}
    model = shaken(
        transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    )
    model.logit_scale.data.fill_(np.log(7))
    model.logit_bias.data.fill_(-3)
    model.save_pretrained(path / "siglip")
    save_processor(path / "siglip", 32)
    return path


def train(path, workdir, *more):
    pair = ("--text.init", path / "siglip", "--image.tower", path / "siglip")
    steps = ("--stream.global_batch=8", "--optimizer.warmup_steps=1", "--dataset", path / "d")
    command("train", "siglip_continue", "--workdir", path / workdir, *pair, *steps, *SHAPE, *more)
    return lit_fast.load(path / workdir)


def embeddings(model):
    """Pixels, embeddings of three pictures and of TEXTS, and the logits, by a model of lit_fast."""
    tower = model.tower
    pixels = np.stack([tower.preprocess.apply(picture(i)) for i in range(3)])
    images = model.embed_features(np.asarray(jax.jit(tower.embed)(tower.params, pixels)))
    texts = model.embed_text(TEXTS)
    logits = np.exp(model.params["t"]) * images @ texts.T + model.params["b"]
    return pixels, images, texts, logits


def assert_same_as_transformers(model, theirs):
    """Return the image embeddings."""
    import torch

    pixels, images, texts, logits = embeddings(model)
    with torch.no_grad():
        got = theirs(
            input_ids=torch.tensor(np.int64(model.tokenizer(TEXTS))),
            pixel_values=normalized(pixels),
            interpolate_pos_encoding=True,
        )
    # Unit vectors of 32 float32 components, two layers; logits are seven times as large.
    np.testing.assert_allclose(got.image_embeds, images, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.text_embeds, texts, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.logits_per_image, logits, rtol=0, atol=1e-4)
    return images


@pytest.mark.parametrize("resolution", [32, 48])
def test_recipe_starts_with_the_embeddings_and_logits_of_the_published_pair(case, resolution):
    """After a step of rate zero; transformers resamples the positions for other resolutions by the same rule."""
    model = train(case, f"start{resolution}", "--examples=8", f"--image.resolution={resolution}")
    optimizer = open_run(case / f"start{resolution}").config.optimizer
    scratch = load_config("siglip_b16_scratch").optimizer
    assert optimizer.learning_rate == pytest.approx(scratch.learning_rate / 100)
    assert (optimizer.weight_decay, optimizer.learning_rate_scale) == (0.0, ())
    transformers = import_package("transformers")
    theirs = transformers.SiglipModel.from_pretrained(case / "siglip").eval()
    assert_same_as_transformers(model, theirs)
    assert model.tower.preprocess.size == resolution


def test_export_as_siglip_model_has_both_trained_towers(case):
    start = ("--examples=0", "--image.resolution=48", "--optimizer.learning_rate=1e-2")
    model = train(case, "trained", *start, "--steps=4")
    command("export", case / "trained", "--format", "transformers", "--out", case / "out")
    theirs, _ = loaded_by_transformers(case / "out", "SiglipModel")
    images = assert_same_as_transformers(model, theirs)
    transformers = import_package("transformers")
    published = transformers.SiglipModel.from_pretrained(case / "siglip").eval()
    with pytest.raises(AssertionError):
        assert_same_as_transformers(model, published)
    assert images.std(axis=0).max() > 0.01  # the pictures differ
