"""Pack several captions into one row of the text tower, without padding between them.

Strategy. A row holds a fixed number of captions, `pack`, so that the number of rows never changes. Captions are
assigned to rows by length such that all rows have nearly the same number of tokens: longest captions first, one per row
and round, the longest of a round to the row with the fewest tokens. Rows are therefore hardly longer than
`pack` times the mean length; `required_row_tokens` estimates that length from a sample once, and it is compiled into
the step. Each device packs its own captions.

Example: one device, six captions a to f of 2, 5, 3, 1, 4, 3 tokens, pack = 2, row_tokens = 8.

    lengths       [2, 5, 3, 1, 4, 3]          captions a, b, c, d, e, f
    assign_rows   [[1, 3], [4, 0], [2, 5]]    rows b d, e a, c f: first round 5, 4, 3 tokens; second round 1, 2, 3
    sizes         [[5, 1], [4, 2], [3, 3]]    tokens of each caption in each row; batch["lengths"]
    starts        [[0, 5], [8, 12], [16, 19]] first token of each caption in the rows one after the other
    ids           b b b b b d . .             "." is the end-of-sentence id, which fills the row
                  e e e e a a . .
                  c c c f f f . .
    slots         [3, 0, 4, 1, 2, 5]          caption a is the fourth (3) in the rows, b the first (0), ...

`slots` restores the order of the captions: the tower returns one embedding per caption and row, and
`embeddings.reshape(-1, width)[slots]` are those of a to f.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.train.input_pipeline.captions import read_captions

_MULTIPLE = 8  # of row lengths, in tokens
_SAMPLE_BLOCKS = 64  # blocks of 1024 rows; the rows are in random order
_SAMPLE_CAPTIONS = 4  # of each of their rows
_DEVIATIONS = 5  # standard deviations of a batch's mean length that a row has room for


@dataclass(frozen=True)
class Packing:
    """Packs the captions of each batch into rows of `row_tokens` tokens.

    A batch that needs longer rows gets them, and the step is compiled once more. With several processes this is an
    error, because the other processes would not know.
    """

    pack: int  # captions per row
    row_tokens: int
    eos_id: int
    mean_tokens: float  # per caption
    devices: int  # of this process
    single_process: bool

    @property
    def description(self) -> str:
        """For the terminal."""
        filled = self.pack * self.mean_tokens / self.row_tokens
        return (
            f"{self.pack} captions of {self.mean_tokens:.1f} tokens on average share a row of {self.row_tokens}, "
            f"{1 - filled:.0%} of it padding"
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Replace the ids int [n, length] of a batch.

        Returns:
          The batch with ids int [n / pack, row_tokens], lengths uint16 [n / pack, pack] and slots int32 [n]. Slots are
          counted from the first caption of each device.

        Raises:
          UserError: the batch needs longer rows and there are several processes.
        """
        ids = batch["ids"]
        lengths = true_lengths(ids, self.eos_id).reshape(self.devices, -1)
        texts = lengths.shape[1]
        tables = np.stack([assign_rows(part, self.pack).ravel() for part in lengths])
        slots = np.empty((self.devices, texts), np.int32)
        np.put_along_axis(slots, tables, np.arange(texts, dtype=np.int32)[None], axis=1)
        sizes = np.take_along_axis(lengths, tables, axis=1).reshape(-1, self.pack)
        order = (tables + np.arange(self.devices)[:, None] * texts).ravel()
        tokens = self._fit_row_tokens(int(sizes.sum(axis=1).max()))
        return batch | {
            "ids": pack_ids(ids[order], sizes, tokens, self.eos_id),
            "lengths": sizes.astype(np.uint16),
            "slots": slots.ravel(),
        }

    def _fit_row_tokens(self, required: int) -> int:
        """Return `row_tokens`, or more if a batch requires it."""
        tokens = self.row_tokens
        if required > tokens and not self.single_process:
            raise UserError(
                f"the captions of a batch need rows of {required} tokens, more than the planned {tokens}; rerun "
                f"with --text.row_tokens {_round_up(required * 17 / 16)}"
            )
        while tokens < required:  # in large steps, because each length is compiled
            tokens = _round_up(tokens * 17 / 16)
        return tokens


def true_lengths(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Return the tokens int64 [n] up to the first end-of-sentence, inclusive, of ids [n, length]; all without one."""
    end = ids == eos_id
    first = end.argmax(axis=1)
    return np.where(end[np.arange(len(ids)), first], first + 1, ids.shape[1])


def assign_rows(lengths: np.ndarray, pack: int) -> np.ndarray:
    """Assign captions to rows: return positions int64 [n / pack, pack] in `lengths` [n].

    In each of `pack` rounds, from the longest captions to the shortest, every row gets one caption; the row with the
    fewest tokens gets the longest.
    """
    rounds = np.argsort(-lengths, kind="stable").reshape(pack, -1)
    table = np.empty((rounds.shape[1], pack), np.int64)
    total = np.zeros(rounds.shape[1], lengths.dtype)
    for column, captions in enumerate(rounds):
        rows = np.argsort(total, kind="stable")
        table[rows, column] = captions
        total[rows] += lengths[captions]
    return table


def pack_ids(ids: np.ndarray, sizes: np.ndarray, row_tokens: int, fill: int) -> np.ndarray:
    """Write captions one after the other into rows.

    Args:
      ids: int [rows * pack, length], in the order of the rows.
      sizes: int [rows, pack], tokens of each caption; the sum of a row is at most `row_tokens`.
      row_tokens: length of a row.
      fill: id at the end of rows.

    Returns:
      ids [rows, row_tokens].
    """
    rows, token = len(sizes), np.arange(ids.shape[1])
    starts = np.cumsum(sizes, axis=1) - sizes + np.arange(rows)[:, None] * row_tokens
    inside = token < sizes.reshape(-1, 1)
    packed = np.full(rows * row_tokens, fill, ids.dtype)
    packed[(starts.reshape(-1, 1) + token)[inside]] = ids[inside]
    return packed.reshape(rows, row_tokens)


def open_packing(config: Config, tokens: Tokens, eos_id: int, mesh: Mesh) -> Packing:
    """Return the packing of a run, with the row length that a sample of the captions requires."""
    lengths = sampled_lengths(tokens, eos_id)
    text, stream = config.text, config.stream
    texts = stream.global_batch * stream.captions_per_image // mesh.size
    row_tokens = text.row_tokens or required_row_tokens(lengths, text.pack, texts)
    devices = len(mesh.local_devices)
    return Packing(text.pack, row_tokens, eos_id, float(lengths.mean()), devices, devices == mesh.size)


def sampled_lengths(tokens: Tokens, eos_id: int) -> np.ndarray:
    """Return the true lengths int64 [m] of captions of evenly spaced blocks.

    Every row contributes the same number of captions, as in batches.
    """
    blocks, reader = tokens.dataset.blocks, tokens.reader()
    sample = np.linspace(0, blocks - 1, min(blocks, _SAMPLE_BLOCKS)).astype(int)
    captions = read_captions(tokens, (reader.read(int(b)) for b in np.unique(sample)))
    rows = np.flatnonzero(np.diff(captions.starts))
    return true_lengths(captions.choose(rows, rows, np.zeros_like(rows), _SAMPLE_CAPTIONS, 0), eos_id)


def required_row_tokens(lengths: np.ndarray, pack: int, texts: int) -> int:
    """Return the row length in tokens that practically every batch fits in.

    Args:
      lengths: int [m], of a representative sample of the captions.
      pack: captions per row.
      texts: captions of a device in one step.
    """
    # A batch with the quantiles and the longest caption of the sample, plus a margin for batches with longer captions
    # on average.
    batch = np.quantile(lengths, (np.arange(texts) + 0.5) / texts, method="inverted_cdf").astype(np.int64)
    batch[-1] = lengths.max()
    longest = batch[assign_rows(batch, pack)].sum(axis=1).max()
    return _round_up(longest + _DEVIATIONS * pack * lengths.std() / texts**0.5)


def _round_up(tokens: float) -> int:
    return -(-int(np.ceil(tokens)) // _MULTIPLE) * _MULTIPLE
