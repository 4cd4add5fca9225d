"""The journal of a shard: complete records survive every damage."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np

from lit_fast.embed.journal import Journal


def make_journal(path: Path, records: int = 5, **belongs: int) -> Journal:
    with closing(Journal(path, 20, 4, belongs)) as journal:
        for i in range(records):
            journal.append(np.full((2, 4), i, ml_dtypes.bfloat16), {2 * i: "bad"} if i % 2 else {})
    return journal


def test_journal_with_any_damage_keeps_the_records_before_it(tmp_path: Path) -> None:
    path = tmp_path / "j"
    whole = make_journal(path, identity=1)
    data = path.read_bytes()
    ends = []
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        with closing(Journal(path, 20, 4, {"identity": 1})) as journal:
            assert journal.done % 2 == 0
            np.testing.assert_array_equal(journal.features[: journal.done], whole.features[: journal.done])
            assert journal.invalid == {r: w for r, w in whole.invalid.items() if r < journal.done}
            ends.append(journal.done)
    assert ends == sorted(ends)
    assert (ends[-1], ends[-2]) == (10, 8)
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with closing(Journal(path, 20, 4, {"identity": 1})) as journal:
            assert journal.done < 10
            np.testing.assert_array_equal(journal.features[: journal.done], whole.features[: journal.done])


def test_journal_of_other_work_is_discarded(tmp_path: Path) -> None:
    make_journal(tmp_path / "j", identity=1)
    with closing(Journal(tmp_path / "j", 20, 4, {"identity": 2})) as journal:
        assert (journal.done, journal.discarded) == (0, True)
    with closing(Journal(tmp_path / "j", 20, 4, {"identity": 2})) as journal:
        assert (journal.done, journal.discarded) == (0, False)
