"""Stage 1: from images to a dataset and the features of a frozen vision tower.

index      sources -> dataset: `sources` (a module per format), row_reader, skipped
extract    dataset -> features: job embeds shards, pipeline runs the tower, shard_writer and journal store
tokenize   captions -> token ids
importers  features that another program computed -> dataset; `import_rows` takes them from a Python program
verify     compare the stored bytes with checksums, sources and a sample of new features
share      push a dataset to the Hugging Face Hub and pull it from there
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_fast.data.dataset import Dataset
    from lit_fast.storage.paths import StrPath

    Rows = Iterable[tuple[str | int, Any, str | Sequence[str] | None]]

__all__ = ["import_rows"]


def import_rows(
    rows: Rows | Callable[[int], Rows],
    out: StrPath,
    *,
    tower: str,
    width: int | None = None,
    source: str = "rows",
) -> Dataset:
    """Make a dataset with features of rows that a program yields, or continue an unfinished one.

    The dataset keeps the order of the rows. A vector that is zero or not finite marks its row invalid. A row without a
    usable key, or with the key of an earlier row, is left out. Both are counted and reported.

    If the program is killed, call the function again with the same rows: rows that were stored are kept, all but those
    of the last minute or the last 4096. An iterable is read from its start again, and its first keys must be the
    stored ones. A function is called with the number of the last stored row, whose key must be the stored one, so that
    no earlier vector is computed again. A finished dataset is returned as it is, and `rows` is not read.

    Args:
      rows: an iterable of (key, vector, captions), or a function that returns the iterable from row `start` on. The
        vector is float `[width]`, of anything that `np.asarray` accepts: NumPy, JAX, PyTorch on the CPU. Captions are
        a text or a list of texts.
      out: directory of the dataset.
      tower: name of the encoder. Features of the same name and width count as features of the same encoder.
      width: of the vectors; None: that of the first one.
      source: name of the rows' origin, recorded in the dataset.

    Returns:
      The dataset.

    Raises:
      UserError: a row is malformed, `out` holds something else, or no row has a usable vector.
    """
    # Imported late, so that `lit-fast --help` is fast.
    from lit_fast.embed.importers import import_rows as importing

    return importing.import_rows(rows, out, tower=tower, width=width, source=source)
