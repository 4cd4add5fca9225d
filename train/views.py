"""Which of a row's views a visit uses."""

from __future__ import annotations

import numpy as np

from train.captions import row_hash

_PURPOSE = 0x766965777300  # so that the choice of the view has nothing to do with that of the caption


def choose_vectors(
    local: np.ndarray, rows: np.ndarray, visit: np.ndarray, views: int, seed: int
) -> np.ndarray:
    """Positions int64 [n] in a `[rows * views, width]` table, one view for each of n rows.

    Drawn anew at every visit from (seed, visit, row) alone, each view with the same probability. Not in
    turn: the captions go round, and would always meet the same view.

    Args:
      local: int64 [n], position of the row in the table.
      rows: int64 [n], row of the dataset, below 2^31.
      visit: int64 [n], the epoch.
      views: views per row.
      seed: of the run.
    """
    if views == 1:
        return local
    return local * views + (row_hash(rows + (visit << 31), seed + _PURPOSE) * views >> 32)
