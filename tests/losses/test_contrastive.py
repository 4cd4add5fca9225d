"""The losses on the ring against their formulas in float64."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lit_fast.config import LossConfig
from lit_fast.losses.accumulate import LogitStats, LossParams, logit_metrics
from lit_fast.losses.contrastive import contrastive_loss
from lit_fast.losses.pairs import apply_head, hash_ids, make_sides, mix
from lit_fast.models.two_towers import apply_image_head
from lit_fast.runtime import AXIS, REPLICATED, SHARDED, make_mesh, shard_map
from lit_fast.utils.normalize import normalize
from tests.losses.dense_loss import dense_loss, pairs

OPTIONS = [
    {},
    {"bias": False, "image_head": True},
    {"same_caption": "mask"},
    {"negatives": "random", "negatives_per_positive": 2.5},
    {"negatives": "hardest", "negatives_per_positive": 1.6, "image_head": True},
    {"negatives": "easiest", "negatives_per_positive": 3.0, "same_caption": "mask"},
    {"name": "softmax"},
    {"name": "softmax", "image_head": True, "same_caption": "mask"},
    {"near_duplicates": "positive", "near_duplicate_cosine": 0.4, "same_caption": "mask"},
    {"near_duplicates": "positive", "near_duplicate_cosine": 0.3, "name": "softmax"},
    {
        "near_duplicates": "mask",
        "near_duplicate_cosine": 0.2,
        "negatives": "hardest",
        "negatives_per_positive": 1.6,
    },
]
NAMES = [" ".join(str(v) for v in o.values()) or "default" for o in OPTIONS]


def draw(seed, n, captions, width=16):
    """Draw a batch, text embeddings and an image head; some rows and captions are repeated."""
    rng = np.random.default_rng(seed)

    def unit(k):
        return np.asarray(normalize(rng.normal(size=(k, width)).astype(np.float32)))

    batch = {
        "features": unit(n),
        "rows": rng.integers(0, max(1, 3 * n // 4), n).astype(np.int32),
        "ids": rng.integers(0, 3, (n * captions, 3)).astype(np.uint16),
        "seeds": rng.integers(0, 2**32, 2, np.uint32),
    }
    return (
        batch,
        unit(n * captions),
        (np.eye(width) + 0.2 * rng.normal(size=(width, width))).astype(np.float32),
    )


def make_params(config, texts, head, log_scale, bias):
    biased = config.name == "sigmoid" and config.bias
    return {
        "texts": texts,
        "log_scale": np.float32(log_scale),
        "bias": np.float32(bias) if biased else None,
        "head": head if config.image_head else None,
    }


def compile_loss(config, num_devices, gather=True, trained=False):
    """Return the jitted (texts, other params, features, rows, ids, seeds) -> (loss, gradients, LogitStats).

    With `trained` the features have gradients, which are the field `images`.
    """

    def compute(texts, others, features, rows, ids, seeds):
        others |= {"images": features if trained else None}
        sides = make_sides(config, num_devices, features, rows, len(ids) // len(rows), lambda: ids, seeds)

        def loss_share(params):
            return contrastive_loss(config, num_devices, params, *sides)

        (loss, stats), grads = jax.value_and_grad(loss_share, has_aux=True)(LossParams(texts, **others))
        (loss, others), sums = jax.lax.psum(
            ((loss, grads._replace(texts=None, images=None)), stats.sums), AXIS
        )
        maxima = jax.tree.map(lambda a: jax.lax.pmax(a, AXIS), stats.maxima)
        sides = grads.texts, grads.images
        dtexts, dimages = jax.lax.all_gather(sides, AXIS, tiled=True) if gather else jax.lax.psum(sides, AXIS)
        return loss, others._replace(texts=dtexts, images=dimages), LogitStats(sums, maxima)

    mesh = make_mesh(jax.devices()[:num_devices])
    specs = (SHARDED, REPLICATED, SHARDED, SHARDED, SHARDED, REPLICATED)
    return jax.jit(shard_map(compute, mesh, specs))


def arguments(batch, params):
    others = {k: v for k, v in params.items() if k != "texts"}
    return params["texts"], others, *(batch[k] for k in ("features", "rows", "ids", "seeds"))


def run(config, num_devices, batch, params, trained=False):
    return compile_loss(config, num_devices, trained=trained)(*arguments(batch, params))


def check(config, num_devices, batch, params, trained=False):
    want, want_grads, positives, negatives = dense_loss(config, batch, **params)
    value, grads, stats = run(config, num_devices, batch, params, trained)
    if not trained:
        assert grads.images is None
        del want_grads["images"]
    metrics = logit_metrics(stats)
    assert [int(c) for c in stats.sums[:2]] == [len(positives), len(negatives)]
    # float32 sums of up to 36 x 108 terms: rounding is a few 1e-7 of the largest term. exp(log_scale) up
    # to 100 magnifies the rounding of a cosine (6e-8) to 6e-6 in a logit, hence in the relative error.
    np.testing.assert_allclose(value, want, rtol=2e-5, atol=1e-6)
    for name, exact in want_grads.items():
        if exact is not None:
            close = {"rtol": 1e-4, "atol": 2e-5 * np.abs(exact).max() + 1e-6}
            np.testing.assert_allclose(getattr(grads, name), exact, **close, err_msg=name)
    for kind, logits in (("positive", positives), ("negative", negatives)):
        for statistic in ("mean", "min", "max"):
            if len(logits):
                got = metrics[f"{kind}_logit_{statistic}"]
                np.testing.assert_allclose(got, getattr(logits, statistic)(), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_loss_of_every_option_equals_its_formula(options, num_devices):
    config = LossConfig(tile=5, precision="highest", **options)
    batch, texts, head = draw(3, 12, 2)
    check(config, num_devices, batch, make_params(config, texts, head, 2.0, -3.0))


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("options", [o for o in OPTIONS if "image_head" not in o], ids=str)
def test_gradient_by_trained_images_of_every_option_equals_its_formula(options, num_devices):
    config = LossConfig(tile=5, precision="highest", **options)
    batch, texts, _ = draw(3, 12, 2)
    check(config, num_devices, batch, make_params(config, texts, None, 2.0, -3.0), trained=True)


cases = st.tuples(
    st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 3), st.floats(-1, 4.6), st.floats(-12, 3)
)


@settings(max_examples=14, deadline=None)
@given(
    options=st.sampled_from(OPTIONS),
    num_devices=st.sampled_from([1, 2, 4]),
    tile=st.integers(1, 12),
    trained=st.booleans(),
    case=cases,
)
def test_loss_of_any_batch_equals_its_formula(options, num_devices, tile, trained, case):
    seed, per_device, captions, log_scale, bias = case
    config = LossConfig(tile=tile, precision="highest", **options)
    batch, texts, head = draw(seed, per_device * num_devices, captions)
    params = make_params(config, texts, head, log_scale, bias)
    # The search does not separate negatives closer than its resolution.
    assume(config.negatives in ("all", "random") or margin(config, batch, params) > 3e-5)
    check(config, num_devices, batch, params, trained and not config.image_head)


def margin(config, batch, params):
    """Return the difference in cosine between the last used negative and the first masked one."""
    names = ("texts", "log_scale", "head")
    everything = dense_loss(replace(config, negatives="all"), batch, **{k: params[k] for k in names})[3]
    cosine = np.sort(everything / np.exp(params["log_scale"])) * (1 if config.negatives == "hardest" else -1)
    cosine = np.sort(cosine)[::-1]
    wanted = int(np.ceil(config.negatives_per_positive * len(batch["ids"])))
    return cosine[wanted - 1] - cosine[wanted] if wanted < len(cosine) else np.inf


@settings(max_examples=50, deadline=None)
@given(options=st.sampled_from(OPTIONS), case=cases)
def test_formula_gradients_equal_differences(options, case):
    """Check the reference itself: its gradients against central differences of its value."""
    seed, n, captions, log_scale, bias = case
    config = LossConfig(**options)
    batch, texts, head = draw(seed, n, captions, 6)
    params = {
        k: None if v is None else np.float64(v)
        for k, v in make_params(config, texts, head, log_scale, bias).items()
    }
    assume(config.negatives in ("all", "random") or margin(config, batch, params) > 1e-3)
    rng = np.random.default_rng(seed)
    _, grads, _, _ = dense_loss(config, batch, **params)
    del grads["images"]  # as `features`, which have no gradient here
    for name, grad in grads.items():
        if grad is None:
            continue
        direction, step = rng.normal(size=np.shape(grad)), 1e-6
        ahead, behind = (
            dense_loss(config, batch, **params | {name: params[name] + s * direction})[0]
            for s in (step, -step)
        )
        # Central differences: the error of the step is 1e-12 times the third derivative (exp(4.6)^3 at worst),
        # that of rounding 1e-16 / 1e-6 times the loss (up to 300).
        np.testing.assert_allclose(
            (ahead - behind) / (2 * step), np.sum(grad * direction), rtol=1e-4, atol=1e-5
        )


def test_sigmoid_at_initialization_is_the_papers_value():
    """With orthogonal embeddings it is 10.00005 + (n - 1) * 4.54e-5."""
    n = 64
    batch = draw(0, n, 1, 2 * n)[0] | {
        "features": np.eye(2 * n, dtype=np.float32)[:n],
        "rows": np.arange(n, dtype=np.int32),
    }
    config = LossConfig(tile=7, precision="highest")
    texts = np.eye(2 * n, dtype=np.float32)[n:]
    value, _, stats = run(config, 4, batch, make_params(config, texts, None, np.log(10), -10.0))
    assert value == pytest.approx(10.00004540 + (n - 1) * 4.539890e-5, rel=1e-6)
    assert logit_metrics(stats)["negative_logit_mean"] == pytest.approx(-10.0)


def test_softmax_without_repeats_is_clips():
    """It equals optax's cross-entropy over rows and columns."""
    config = LossConfig(name="softmax", tile=5, precision="highest")
    batch, texts, _ = draw(1, 16, 1)
    batch["rows"] = np.arange(16, dtype=np.int32)
    value, grads, _ = run(config, 4, batch, make_params(config, texts, None, np.log(20), 0))

    def clip(texts, log_scale):
        logits = jnp.exp(log_scale) * jnp.dot(batch["features"], texts.T, precision="highest")
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return (cross_entropy(logits, jnp.arange(16)) + cross_entropy(logits.T, jnp.arange(16))).mean() / 2

    want, want_grads = jax.value_and_grad(clip, (0, 1))(texts, jnp.float32(np.log(20)))
    # Both are float32; a logit of 20 has a rounding of 2e-6.
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grads.texts, want_grads[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads.log_scale, want_grads[1], rtol=1e-4, atol=1e-6)


def test_softmax_of_extreme_logits_is_finite():
    """At temperature e^9 all but the largest exponential of a softmax are zero."""
    config = LossConfig(name="softmax", tile=3, precision="highest")
    batch, texts, _ = draw(5, 12, 2)
    check(config, 2, batch, make_params(config, texts, None, np.float32(6.0), 0))
    _, grads, _ = run(config, 2, batch, make_params(config, texts, None, np.float32(9.0), 0))
    assert np.isfinite(grads.texts).all()


@pytest.mark.parametrize("kind", ["random", "hardest", "easiest"])
def test_negatives_are_as_many_as_configured(kind):
    n, captions, per_positive = 256, 2, 20.0
    config = LossConfig(negatives=kind, negatives_per_positive=per_positive, tile=100)
    batch, texts, _ = draw(7, n, captions)
    batch["rows"] = np.arange(n, dtype=np.int32)
    params = make_params(config, texts, None, np.log(10), -10.0)
    counts = [int(run(config, d, batch, params)[2].sums.num_negatives) for d in (1, 4)]
    wanted = per_positive * n * captions
    if kind == "random":
        # Binomial: one standard deviation is below sqrt(10 240) = 101. The choice does not depend on the devices.
        assert abs(counts[0] - wanted) < 500
        assert counts[0] == counts[1]
    else:
        # 130 560 negatives over a range of about 1.6: some 0.6 of them within the resolution of the search.
        assert all(wanted <= count <= wanted + 8 for count in counts)


def test_random_negatives_of_other_seeds_differ():
    """Each text and each image keeps about its share, and two choices agree by chance alone."""
    config = LossConfig(negatives="random", negatives_per_positive=64.0)
    batch, _, _ = draw(7, 256, 1)
    batch["rows"] = np.arange(256, dtype=np.int32)
    masks = [pairs(config, batch | {"seeds": np.uint32([s, 1])}, np.zeros((256, 256)))[1] for s in range(8)]
    share = np.mean(masks, axis=0)
    # 8 x 255 draws of probability 64/255 a row and a column: standard deviation 0.0096; six of them.
    for axis in (0, 1):
        np.testing.assert_allclose(share.sum(axis) / 255, 64 / 255, atol=0.058)
    # Two choices agree by chance alone: in 65 280 pairs 6.3 % are kept in both, standard deviation 0.1 %.
    for one, other in pairwise(masks):
        assert (one & other).sum() / (256 * 255) == pytest.approx((64 / 255) ** 2, abs=0.006)


def test_hashes_of_different_captions_differ():
    rng = np.random.default_rng(0)
    ids = np.unique(rng.integers(0, 8, (100_000, 9)), axis=0).astype(np.uint16)
    hashes = np.asarray(hash_ids(ids)).astype(np.uint64)
    assert len(np.unique(hashes[:, 0] << np.uint64(32) | hashes[:, 1])) == len(ids)
    # One half alone must be as good as 32 random bits: 100 000 of them have about 1.2 pairs in common.
    assert len(ids) - len(np.unique(hashes[:, 0])) <= 12
    np.testing.assert_array_equal(hash_ids(ids[:5].astype(np.int32)), hash_ids(ids[:5]))
    assert len(np.unique(mix(np.arange(2**16, dtype=np.uint32)))) == 2**16


@pytest.mark.parametrize("options", OPTIONS[1:], ids=NAMES[1:])
def test_compiled_loss_has_no_all_gather_and_linear_memory(options):
    """The default options are checked in the whole step."""

    def temporary(n, tile=32, trained=False):
        config = LossConfig(tile=tile, precision="highest", **options)
        batch, texts, head = draw(0, n, 1)
        params = make_params(config, texts, head, 2.0, -3.0)
        loss = compile_loss(config, 4, gather=False, trained=trained)
        compiled = loss.lower(*arguments(batch, params)).compile()
        assert "all-gather" not in compiled.as_text()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(1024), temporary(4096)
    # Four times the batch needs at most four times the memory, which has in it a tile of 32 x 256 pairs in a
    # few copies; all pairs of a device in one array would need sixteen times.
    assert large <= 4.4 * small
    if not options.get("image_head"):
        assert temporary(4096, trained=True) <= 4.4 * temporary(1024, trained=True)
    if options == OPTIONS[1]:  # the check finds an array of all pairs if there is one
        assert temporary(4096, 1024) > 4.4 * temporary(1024, 256)


def test_image_head_in_evaluation_equals_training():
    batch, _, head = draw(0, 20, 1)
    want = apply_head(batch["features"], head, "highest")
    got = apply_image_head({"img": {"head": {"kernel": head}}}, batch["features"])
    np.testing.assert_allclose(got, want, atol=5e-7)  # float32 sums of 16 terms
    assert apply_image_head({}, batch["features"]) is batch["features"]
