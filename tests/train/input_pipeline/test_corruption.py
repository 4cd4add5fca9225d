"""Corrupted training data: as much as was asked for, the same in every process, and nothing when it is off."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.config import StreamConfig
from lit_fast.data.dataset import BLOCK, open_dataset
from lit_fast.data.features import open_features
from lit_fast.data.tokens import open_tokens
from lit_fast.errors import UserError
from lit_fast.train.input_pipeline.corruption import Corruption
from lit_fast.train.input_pipeline.stream import open_stream
from tests.synthetic import make_dataset, row_numbers, write_features

MEMORY = StreamConfig(global_batch=64, captions_per_image=2)
WINDOWS = StreamConfig(
    global_batch=256, captions_per_image=2, memory_gib=0.0, shuffle_streams=4, shuffle_window_blocks=2
)
NOISE = 20
FIRST = 128 * 120  # the row number that the features of noise begin with


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small and a large dataset, and noise of the same tower."""
    path = tmp_path_factory.mktemp("corrupt")
    make_dataset(path / "small", 300, captions=3, invalid=(3,))
    make_dataset(path / "large", 8 * BLOCK, captions=2)
    noise = make_dataset(path / "noise", NOISE, invalid=(7,))
    values = open_features(noise).read_all().astype(np.float64)
    values[:, 1] = FIRST // 128
    write_features(noise, values, invalid=(7,))
    return path


def opened(folder, config, seed=0, part=(0, 1)):
    features = features_of(folder / ("large" if config.memory_gib == 0 else "small"))
    if config.corrupt_images:
        config = replace(config, noise=str(folder / "noise"))
    return open_stream(features, open_tokens(features.dataset), config, seed, part)


def features_of(path):
    return open_features(open_dataset(path))


CASES = {
    "images": {"corrupt_images": 0.3},
    "texts": {"corrupt_texts": 0.3},
    "alignment": {"corrupt_alignment": 0.3},
    "everything": {"corrupt_images": 0.5, "corrupt_texts": 0.2, "corrupt_alignment": 1.0},
}


@pytest.mark.parametrize("config", [MEMORY, WINDOWS], ids=["memory", "windows"])
@pytest.mark.parametrize("name", CASES)
def test_corruption_is_equal_for_any_number_of_processes_and_order(folder, config, name):
    config = replace(config, **CASES[name])
    whole = opened(folder, config).batches
    steps = (0, 1, 30, 5)
    parts = [opened(folder, config, part=(p, 4)).batches for p in range(4)]
    for step in steps:
        for key, value in whole[step].items():
            joined = np.concatenate([part[step][key] for part in parts])
            assert joined.tobytes() == value.tobytes()
    resumed = opened(folder, config).iterate(30)
    assert next(resumed)["ids"].tobytes() == whole[30]["ids"].tobytes()


@pytest.mark.parametrize("config", [MEMORY, WINDOWS], ids=["memory", "windows"])
def test_corruption_changes_only_the_configured_parts(folder, config):
    clean = opened(folder, config)
    got = {name: opened(folder, replace(config, **case)) for name, case in CASES.items()}
    identities = {s.identity for s in (clean, *got.values())}
    assert len(identities) == 1 + len(CASES)
    for step in (0, 9):
        want = clean.batches[step]
        batches = {name: stream.batches[step] for name, stream in got.items()}
        for batch in batches.values():  # a corrupted pair is the positive of its position
            np.testing.assert_array_equal(batch["rows"], want["rows"])
        for name in ("texts", "alignment"):
            assert batches[name]["images"].tobytes() == want["images"].tobytes()
        assert batches["images"]["ids"].tobytes() == want["ids"].tobytes()
        # Shuffling loses no text, and the captions of an image stay together.
        one, two = (b["ids"].reshape(config.global_batch, -1) for b in (want, batches["alignment"]))
        np.testing.assert_array_equal(np.sort(one.view("V32"), axis=0), np.sort(two.view("V32"), axis=0))


@pytest.mark.parametrize("config", [MEMORY, WINDOWS], ids=["memory", "windows"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_corrupted_shares_are_the_configured_ones(folder, config, share):
    options = {"corrupt_images": share, "corrupt_texts": share}
    clean, noisy = opened(folder, config).batches, opened(folder, replace(config, **options)).batches
    images, texts, used = 0, 0, set()
    steps = 30
    for step in range(steps):
        want, batch = clean[step], noisy[step]
        numbers = row_numbers(batch["images"])
        replaced = numbers != want["rows"]
        assert (numbers[replaced] >= FIRST).all()
        used |= set((numbers[replaced] - FIRST).tolist())
        images += int(replaced.sum())
        # Of the few words here random tokens are never a caption.
        texts += int((batch["ids"] != want["ids"]).any(axis=1).sum())
    assert used == set(range(NOISE)) - {7}  # each noise image, never the invalid one
    for count, n in ((images, steps * config.global_batch), (texts, 2 * steps * config.global_batch)):
        # Five standard deviations of a binomial distribution; none of them at share 1.
        assert abs(count - n * share) <= 5 * np.sqrt(n * share * (1 - share))


@settings(deadline=None)
@given(batch=st.integers(1, 500), share=st.floats(0, 1, exclude_min=True), step=st.integers(0, 2**31 - 1))
def test_text_positions_move_the_share_of_the_batch(batch, share, step):
    drawn = Corruption(
        StreamConfig(global_batch=batch, corrupt_alignment=share), 0, None, np.empty(0), np.empty(0), ""
    )
    positions = drawn.text_positions(step)
    np.testing.assert_array_equal(np.sort(positions), np.arange(batch))
    moved = round(share * batch)
    assert (positions != np.arange(batch)).sum() == (moved if moved > 1 else 0)  # one alone has nowhere to go
    np.testing.assert_array_equal(positions, drawn.text_positions(step))


def test_random_texts_are_uniform_in_length_and_tokens(folder):
    tokenizer = open_tokens(open_dataset(folder / "small")).tokenizer()
    batch, steps = 2000, 10
    config = StreamConfig(global_batch=batch, corrupt_texts=1.0)
    random = Corruption(config, 0, tokenizer, tokenizer.text_ids(), np.empty((0, 16)), "")
    found = []
    for step in range(steps):
        ids = np.zeros((batch, tokenizer.max_length), np.uint16)
        random.replace(step, 0, np.empty((batch, 16)), ids)
        found.append(ids)
    assert not np.array_equal(found[0], found[1])
    ids = np.concatenate(found)
    lengths = (ids == tokenizer.eos_id).argmax(axis=1)
    for row, length in zip(ids[:500], lengths[:500], strict=True):  # as the tokenizer ends and pads
        assert (row[length:] == tokenizer.eos_id).all()
        assert set(row[:length].tolist()) <= set(tokenizer.text_ids().tolist())
    special = {0, tokenizer.eos_id, tokenizer.pad_id}  # 0 is the unknown piece
    assert special.isdisjoint(tokenizer.text_ids().tolist())
    counts = np.bincount(lengths, minlength=tokenizer.max_length)
    assert counts[0] == 0
    # 20 000 lengths of 7 kinds: five standard deviations are 247.
    np.testing.assert_allclose(counts[1:], len(ids) / (tokenizer.max_length - 1), atol=247)
    before_the_end = np.arange(tokenizer.max_length) < lengths[:, None]
    tokens = np.bincount(ids[before_the_end])[tokenizer.text_ids()]
    mean = tokens.sum() / len(tokens)
    # Poisson, about 290 of each of 270 pieces: six standard deviations.
    np.testing.assert_allclose(tokens, mean, atol=6 * np.sqrt(mean))


def test_noise_of_another_tower_raises(folder, tmp_path):
    noise = make_dataset(tmp_path / "noise", 5)
    tower = Path(noise.path) / "features/tower/tower.json"
    tower.write_text(tower.read_text().replace('"identity": "', '"identity": "x'))
    config = replace(MEMORY, corrupt_images=0.5, noise=str(noise.path))
    with pytest.raises(
        UserError, match="has no features of the run's tower tower but tower, of other weights"
    ):
        open_stream(features_of(folder / "small"), open_tokens(open_dataset(folder / "small")), config, 0)


def test_identity_of_a_clean_stream_has_no_corruption(folder):
    features = features_of(folder / "small")
    tokens = open_tokens(features.dataset)
    skipped = hashlib.blake2b(np.array([3], np.int64).tobytes(), digest_size=16).hexdigest()
    parts = ["1", features.dataset.digest, features.identity, tokens.meta["identity"], 0, 64, 2, skipped]
    identity = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    assert opened(folder, MEMORY).identity == identity
