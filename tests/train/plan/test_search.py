"""The search for faster candidates, with this machine's compiler."""

from dataclasses import replace

import jax
import pytest

from lit_fast.config_io import load_config
from lit_fast.train.plan import search as search_module
from lit_fast.train.plan.candidates import Planner
from lit_fast.train.plan.search import fastest, largest_batch, search
from lit_fast.train.plan.target import open_target
from tests.train.plan.test_plan import SMALL


@pytest.fixture
def config(tmp_path):
    (tmp_path / "c.toml").write_text(SMALL.replace("depth = 3", "depth = 2"))
    return load_config(tmp_path / "c.toml")


@pytest.fixture
def target():
    """This machine with so little memory per device that not every policy fits."""
    target = open_target("cpu")
    return target._replace(chip=target.chip._replace(memory=64 * 2**20))


def test_search_compiles_few_candidates_and_sorts_those_that_fit_by_time(config, target, capsys):
    planner = Planner(config, target)
    default = planner.default()
    found = search(planner, default)
    assert len(found) <= planner.compiles <= search_module.MAX_COMPILES
    assert default in found
    texts = [candidate.text for candidate in found]
    assert len(set(texts)) == len(texts)
    assert len({text.keep for text in texts}) > 1
    assert max(text.pack for text in texts) == 16  # rows of 128 tokens, captions of 8
    assert len({text.microbatches for text in texts if text.keep == fastest(planner, found).text.keep}) > 1
    assert all(candidate.compiled for candidate in found if candidate.fits)
    order = [(not candidate.fits, planner.relative_seconds(candidate)) for candidate in found]
    assert order == sorted(order)
    assert fastest(planner, found) == found[0]
    assert f"compiling {found[0].text.keep}" in capsys.readouterr().err or found[0] == default


def test_search_without_a_candidate_that_fits_finds_none(config, target):
    small = target._replace(chip=target.chip._replace(memory=2**20))
    planner = Planner(replace(config, text=replace(config.text, keep="inputs")), small)
    default = planner.default()
    assert not default.fits
    assert search(planner, default) == [default]
    assert fastest(planner, [default]) is None


def test_largest_batch_by_the_compiler_fits_and_twice_as_much_does_not(config, target):
    found = largest_batch(config, target)
    assert found["by"] == "compiler"
    assert found["global_batch"] % jax.device_count() == 0

    def step(batch):
        text = replace(config.text, keep="auto")
        planner = Planner(
            replace(config, text=text, stream=replace(config.stream, global_batch=batch)), target
        )
        flags = dict(zip(*[iter(found["overrides"].split())] * 2, strict=True))
        count = int(flags["--text.microbatches"]) * batch // found["global_batch"]
        return planner.evaluate(replace(planner.config.text, keep="embeddings", microbatches=count))

    fits = step(found["global_batch"])
    assert fits.fits
    assert fits.bytes == found["bytes"]
    assert not step(2 * found["global_batch"]).fits
