"""What the tests of several export formats share."""

from functools import cache

import pytest

from lit_fast.towers.tower import load_tower
from tests.weights.checkpoints import write_huggingface
from tests.weights.test_families import HUGGINGFACE


@pytest.fixture(scope="session")
def towers(tmp_path_factory):
    """The tower of a family from transformers by its name."""

    @cache
    def load(case):
        weights, _, _, _, config = HUGGINGFACE[case]
        folder = write_huggingface(tmp_path_factory.mktemp("tower"), weights, case.split()[0], **config)
        return load_tower(str(folder))

    return load
