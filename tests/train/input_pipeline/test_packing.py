"""Packed captions: none is lost, little padding is left, and loss and gradients equal those of padded captions."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.config import Config, LossConfig, OptimizerConfig, StreamConfig, TextConfig
from lit_fast.data.tokens import decode_record, encode_record
from lit_fast.errors import UserError
from lit_fast.models.sizes import Shape
from lit_fast.models.text_tower import TextTower, unpack_captions
from lit_fast.models.two_towers import init_params
from lit_fast.runtime import batch_sharding, make_mesh
from lit_fast.train.input_pipeline.packing import (
    Packing,
    assign_rows,
    required_rows,
    sampled_lengths,
    true_lengths,
    with_rows,
)
from lit_fast.train.optimizer import make_optimizer
from lit_fast.train.step import init_state, make_step

EOS, LENGTH, WIDTH, VOCAB = 1, 12, 24, 50
# Half of the compiler's work is machine code that runs fast, which one step does not need.
QUICK = {"xla_backend_optimization_level": 0}
SHAPE = Shape(width=32, depth=2, mlp_dim=64, heads=4)


def captions(seed, n, padding=EOS):
    """Ids [n, LENGTH] of captions of all lengths, some of them cut."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, VOCAB, (n, LENGTH)).astype(np.uint16)
    lengths = rng.integers(1, LENGTH + 2, n)  # one more: cut, without an end
    ids[np.arange(LENGTH) == lengths[:, None] - 1] = EOS
    ids[np.arange(LENGTH) >= lengths[:, None]] = padding
    return ids


def packing(texts, rows, row_tokens=8, devices=1, all_devices=None):
    """Of `texts` captions of a device in `rows` rows."""
    all_devices = all_devices or devices
    text = TextConfig(mask_padding=True, pack=2, rows=rows * all_devices, row_tokens=row_tokens)
    return Packing(text, texts, EOS, 0.0, devices, all_devices)


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 9), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=60)
def test_packing_puts_every_caption_into_its_slot(seed, texts, rows, devices):
    ids = captions(seed, texts * devices, padding=0)
    batch = packing(texts, rows, devices=devices)({"ids": ids, "rows": None})
    lengths = true_lengths(ids, EOS)
    places = -(-texts // rows)
    assert batch["lengths"].shape == (rows * devices, places)
    assert len(batch["ids"]) == rows * devices
    assert batch["lengths"].sum() == lengths.sum()
    assert batch["lengths"].sum(axis=1).max() <= batch["ids"].shape[1]
    sizes, slots = batch["lengths"].astype(int), batch["slots"].reshape(devices, -1)
    for text in range(len(ids)):
        device, position = divmod(text, texts)
        row, column = divmod(int(slots[device, position]), places)
        row += device * rows
        assert sizes[row, column] == lengths[text]
        begin = sizes[row, :column].sum()
        found = batch["ids"][row, begin : begin + lengths[text]]
        np.testing.assert_array_equal(found, ids[text, : lengths[text]])
    assert len(set(zip(np.arange(len(ids)) // texts, batch["slots"], strict=True))) == len(ids)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(1, 20))
@settings(deadline=None, max_examples=100)
def test_assign_rows_balances_as_one_caption_after_the_other_would(lengths, rows):
    """Captions that are assigned at once go where a loop over single captions puts them, but for rows of equal size."""
    places = -(-len(lengths) // rows)
    tokens, count = np.zeros(rows, int), np.zeros(rows, int)
    for length in sorted(lengths, reverse=True):
        row = min(np.flatnonzero(count < places), key=lambda r: tokens[r])
        tokens[row] += length
        count[row] += 1
    table = assign_rows(np.array(lengths), rows)
    assert sorted(table[table < len(lengths)]) == list(range(len(lengths)))
    assert np.append(lengths, 0)[table].sum(axis=1).max() <= tokens.max() + max(lengths)


def test_packing_of_the_documented_example_gives_its_arrays():
    """The example in the docstring of the module."""
    a, b, c, d, e, f = range(10, 16)
    texts = [[a, a], [b] * 5, [c] * 3, [d], [e] * 4, [f] * 3]
    ids = np.array([[*text[:-1], EOS] + [EOS] * (6 - len(text)) for text in texts], np.uint16)
    lengths = true_lengths(ids, EOS)
    np.testing.assert_array_equal(lengths, [2, 5, 3, 1, 4, 3])
    np.testing.assert_array_equal(assign_rows(lengths, 3), [[1, 3], [4, 0], [2, 5]])
    batch = packing(6, 3)({"ids": ids})
    np.testing.assert_array_equal(batch["lengths"], [[5, 1], [4, 2], [3, 3]])
    np.testing.assert_array_equal(batch["slots"], [3, 0, 4, 1, 2, 5])
    rows = [
        [b, b, b, b, EOS, EOS, EOS, EOS],
        [e, e, e, EOS, a, EOS, EOS, EOS],
        [c, c, EOS, f, f, EOS, EOS, EOS],
    ]
    np.testing.assert_array_equal(batch["ids"], rows)


def test_unpacked_returns_the_captions():
    ids = captions(0, 12)
    batch = packing(12, 5)({"ids": ids})
    found = unpack_captions(*(jnp.asarray(batch[k]) for k in ("ids", "lengths", "slots")), LENGTH)
    inside = np.arange(LENGTH) < true_lengths(ids, EOS)[:, None]
    np.testing.assert_array_equal(found, np.where(inside, ids.astype(int), -1))


def test_true_lengths():
    ids = np.array([[5, 1, 1], [1, 1, 1], [5, 6, 7], [5, 6, 1], [5, 1, 0]])
    np.testing.assert_array_equal(true_lengths(ids, EOS), [2, 1, 3, 3, 2])


@pytest.mark.parametrize(
    ("longest", "mean", "texts", "share"),
    [(16, 12.5, 8192, 0.07), (64, 16.6, 8192, 0.1), (64, 16.6, 256, 0.3)],
)
def test_packing_leaves_little_padding(longest, mean, texts, share):
    """With the lengths of web alt-texts, in rows planned from other captions."""
    rng = np.random.default_rng(0)
    draw = lambda: np.clip(rng.gamma(4, mean / 4, texts).round().astype(int), 2, longest)  # noqa: E731
    rows = required_rows(draw(), texts, 128)
    for _ in range(20):
        lengths = draw()
        assert np.append(lengths, 0)[assign_rows(lengths, rows)].sum(axis=1).max() <= 128
        assert 1 - lengths.sum() / (128 * rows) < share


def test_required_rows_with_one_long_caption_has_room():
    lengths = np.full(4096, 8)
    lengths[17] = 64
    rows = required_rows(lengths, 256, 64)
    batch = np.append(lengths[:256], 0)
    assert batch[assign_rows(lengths[:256], rows)].sum(axis=1).max() <= 64
    assert 33 <= rows <= 40


@pytest.mark.parametrize(
    ("pack", "mean", "max_length", "row_tokens"),
    [
        (8, 12.5, 16, 128),
        (4, 12.5, 16, 64),
        (3, 12.5, 16, 48),
        (2, 10, 64, 64),
        (2, 20, 77, 128),
        (16, 16, 64, 256),
    ],
)
def test_rows_have_a_length_that_fills_registers(pack, mean, max_length, row_tokens):
    text = TextConfig(mask_padding=True, pack=pack)
    found = with_rows(text, np.full(100, mean), 64, max_length, 2)
    assert found.row_tokens == row_tokens
    assert found.rows % 2 == 0
    assert with_rows(found, np.full(100, 2), 64, max_length, 2) == found  # what is set is kept


def test_rows_can_be_divided_in_the_given_microbatches():
    text = TextConfig(mask_padding=True, pack=8, keep="hidden", microbatches=3)
    assert with_rows(text, np.full(100, 16), 64, 16, 2).rows == 18


def test_rows_that_are_shorter_than_a_caption_raise():
    text = TextConfig(mask_padding=True, pack=8, row_tokens=12)
    with pytest.raises(UserError, match=r"text.row_tokens 12 is less .* needs; use 16 or more"):
        with_rows(text, np.full(100, 8), 64, 16, 2)


def test_sampled_lengths_weigh_all_rows_equally():
    """A batch takes as many of every row."""
    record = encode_record([[[5] * 7 + [EOS]], [], [[5, EOS]] * 3] * 300, VOCAB)
    tokens = SimpleNamespace(
        dataset=SimpleNamespace(blocks=1),
        reader=lambda: SimpleNamespace(read=lambda block: record),
        decode=lambda record: decode_record(record, VOCAB, LENGTH, EOS),
    )
    assert sampled_lengths(tokens, EOS).mean() == (8 + 2) / 2


def test_packing_of_a_long_batch_extends_rows_or_raises_with_several_processes():
    ids = np.full((8, LENGTH), 5, np.uint16)
    batch = packing(8, 2, row_tokens=40)({"ids": ids})
    assert batch["ids"].shape == (2, 48)
    np.testing.assert_array_equal(batch["lengths"], LENGTH)
    with pytest.raises(
        UserError, match=r"rows of 48 tokens, more than the planned 40; rerun with --text.rows 6$"
    ):
        packing(8, 2, row_tokens=40, all_devices=2)({"ids": ids})
    batch = packing(8, 3, row_tokens=40, all_devices=2)({"ids": ids})
    assert batch["ids"].shape == (3, 40)


def perturbed_params(tower):
    """Parameters in which every one matters."""
    rng = np.random.default_rng(0)
    params = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))["params"]
    return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), params)


@pytest.mark.parametrize("pooling", ["last", "first", "mean", "max", "map"])
def test_packed_caption_is_embedded_as_if_alone(pooling):
    ids = captions(0, 12)
    alone = TextTower(SHAPE, VOCAB, LENGTH, WIDTH, pooling=pooling, eos_id=EOS)
    params = perturbed_params(alone)
    want = jax.jit(alone.apply)({"params": params}, ids.astype(int))
    batch = packing(12, 5, row_tokens=18)({"ids": ids})  # with places and tokens that are not used
    assert (batch["lengths"].sum(axis=1) == 18).any()
    assert (batch["lengths"] == 0).any()
    got = jax.jit(alone.apply)({"params": params}, batch["ids"].astype(int), batch["lengths"])[batch["slots"]]
    # Outputs of about 1, two float32 layers.
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("pooling", ["last", "mean", "map"])
def test_padded_captions_that_share_a_row_are_embedded_as_if_alone(pooling):
    ids = captions(0, 12).astype(int)
    alone = TextTower(SHAPE, VOCAB, LENGTH, WIDTH, pooling=pooling)
    params = perturbed_params(alone)
    together = jax.jit(alone.clone(pack=4).apply).lower({"params": params}, ids)
    assert f"tensor<3x4x{4 * LENGTH}x{4 * LENGTH}xf32>" in together.as_text()  # scores of three rows
    want = jax.jit(alone.apply)({"params": params}, ids)
    np.testing.assert_allclose(together.compile()({"params": params}, ids), want, atol=2e-5)


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (1, {"pooling": "last", "keep": "hidden"}),
        (2, {"pooling": "mean", "parts": 2, "keep": "embeddings", "same_caption": "mask", "captions": 2}),
    ],
)
def test_step_of_packed_batch_equals_padded_batch(devices, options):
    """Loss, gradients and update of the packed batch are those of the padded one."""
    rng = np.random.default_rng(1)
    n, k = 16, options.get("captions", 1)
    ids = captions(2, n * k)
    ids[5] = ids[2]  # equal captions, for same_caption
    batch = {
        "images": rng.normal(size=(n, WIDTH)).astype(ml_dtypes.bfloat16),
        "ids": ids,
        "rows": np.arange(n, dtype=np.int32),
    }
    mesh = make_mesh(jax.devices()[:devices])
    results = []
    for pack in (1, 2):
        text = TextConfig(
            mask_padding=True,
            pack=pack,
            keep=options.get("keep", "inputs"),
            microbatches=options.get("parts", 1),
        )
        config = Config(
            steps=10,
            text=text,
            loss=LossConfig(precision="highest", same_caption=options.get("same_caption", "negative")),
            stream=StreamConfig(global_batch=n, captions_per_image=k),
            optimizer=OptimizerConfig(name="adam", warmup_steps=1, clip_norm=0),
        )
        tower = TextTower(
            SHAPE,
            VOCAB,
            LENGTH,
            WIDTH,
            pooling=options["pooling"],
            eos_id=EOS,
            pack=pack,
        )
        params = init_params(tower, config, np.zeros(WIDTH, np.float32))
        optimizer = make_optimizer(config.optimizer, config.steps, params)
        state = init_state(params, optimizer, mesh)
        texts = n * k // devices
        given = batch if pack == 1 else packing(texts, texts // 2, devices=devices, row_tokens=24)(batch)
        given = {key: jax.device_put(a, batch_sharding(mesh)) for key, a in given.items()}
        step = make_step(tower, optimizer, config, mesh).lower(state, given).compile(QUICK)
        state, metrics = step(state, given)
        momentum = jax.tree.leaves(jax.device_get(state.opt))
        results.append((float(metrics["loss"]), [np.asarray(a) for a in momentum]))
    (loss, plain), (packed_loss, packed) = results
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    # Moments of the gradients: sums in another order, in float32. Those of the keys' biases are nothing else.
    largest = max(np.abs(a).max() for a in plain)
    for a, b in zip(packed, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6 * largest)
