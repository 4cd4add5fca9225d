"""A small run trained by the commands on pictures, and models with random weights."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import sentencepiece

from lit_fast import api
from lit_fast.cli.main import main
from lit_fast.config import Config, LossConfig, TextConfig
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.inference.model import Model
from lit_fast.models.two_towers import init_params, text_tower
from lit_fast.towers.tower import Tower
from tests import reference
from tests.helpers import samples, write_tar

CONFIG = """
steps = 4
[text]
variant = "mu"
[loss]
center = true
image_head = true
[stream]
global_batch = 16
[optimizer]
warmup_steps = 1
average_decay = 0.5
[checkpoint]
every_steps = 2
"""


def train_run(directory: Path, tower: Path) -> Path:
    """Train four steps with image head, centring and average; the dataset `directory/d` has 24 pictures."""
    write_tar(directory / "pairs.tar", samples(24))
    (directory / "c.toml").write_text(CONFIG)
    data, run = directory / "d", directory / "run"
    api.index(directory / "pairs.tar", out=data)
    api.embed(data, tower=tower)
    api.tokenize(data, train_vocab=284, name="words", max_length=12)
    api.train(directory / "c.toml", workdir=run, dataset=data, config={"evaluate.retrieval": [data]})
    return run


def command(*arguments: object) -> None:
    """Run `lit-fast` with these arguments; it must succeed."""
    assert main([str(a) for a in arguments]) == 0


def random_model(tower: Tower, text: TextConfig, loss: LossConfig = LossConfig(), **about: Any) -> Model:  # noqa: B008
    """Return a model with random text tower, mean and image head."""
    module = text_tower(text, words(), tower.width)
    mean = jax.ShapeDtypeStruct((tower.width,), np.float32)
    config = Config(text=text, loss=loss)
    shapes = jax.eval_shape(lambda mean: init_params(module, config, mean), mean)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
    if not loss.center:
        params["mean"] = np.zeros(tower.width, np.float32)
    fields = {"tower_json": tower.provenance("float32"), "tokenizer": words(), "params": params}
    fields |= {"config": text, "loss": loss, "receipt": None, "open_tower": lambda: tower}
    return Model(**({"name": "random", "step": 7, "average": False} | fields | about))


def reference_texts(model: Model, texts: list[str]) -> np.ndarray:
    """Return the embeddings of texts in float64, computed by tests/reference.py."""
    ids, mask = model.tokenizer(texts), None
    if model.config.mask_padding:
        lengths = np.array([len(kept) for kept in model.tokenizer.encode(texts)[0]])
        mask = np.arange(ids.shape[1]) < lengths[:, None]
    exact = jax.tree.map(np.float64, model.params["txt"])
    raw = reference.text_tower(ids, exact, model.config.pooling, mask)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


@cache
def words() -> Tokenizer:
    """Return a tokenizer with 300 pieces and 8 tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red thing", "a green one", "blue things", "not a thing"] * 5),
        model_writer=model, vocab_size=300, byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(model.getvalue(), 8)
