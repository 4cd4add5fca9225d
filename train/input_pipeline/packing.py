"""Pack several captions into one row of the text tower, without padding between them.

Strategy. The number of rows of a step and their length are compiled into it, so they never change, and neither does
the number of places of a row, k. Captions are assigned to rows such that all have nearly the same number of tokens: the
longest captions first, each to the row with the fewest tokens; then rows exchange captions. A row may have fewer
captions than places; the rest of its places are captions of no token. `required_rows` finds the number of rows once,
from a sample of the captions. Each device packs its own captions.

Rows have about `text.pack` captions. The length of long ones is a multiple of 128, the lanes of a TPU's register.

Example: one device, six captions a to f of 2, 5, 3, 1, 4, 3 tokens, rows = 3 and so k = 2, row_tokens = 8.

    lengths       [2, 5, 3, 1, 4, 3]          captions a, b, c, d, e, f
    assign_rows   [[1, 3], [4, 0], [2, 5]]    rows b d, e a, c f: b, e, c to empty rows; f to c, a to e, d to b
    sizes         [[5, 1], [4, 2], [3, 3]]    tokens of each caption in each row; batch["lengths"]
    starts        [[0, 5], [8, 12], [16, 19]] first token of each caption in the rows one after the other
    ids           b b b b b d . .             "." is the end-of-sentence id, which fills the row
                  e e e e a a . .
                  c c c f f f . .
    slots         [3, 0, 4, 1, 2, 5]          caption a is the fourth (3) in the rows, b the first (0), ...

`slots` restores the order of the captions: the tower returns one embedding per place, and
`embeddings.reshape(-1, width)[slots]` are those of a to f.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import Mesh

from lit_fast.config import Config, TextConfig
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.train.input_pipeline.captions import read_captions

_SHORT = 64  # tokens; longer rows fill the lanes of registers
_LANES = 128
_SUBLANES = 16  # of bfloat16
_SAMPLE_BLOCKS = 64  # blocks of 1024 rows; the rows are in random order
_SAMPLE_CAPTIONS = 4  # of each of their rows
_EXCHANGES = 3  # between rows; more change little
_DEVIATIONS = 5  # standard deviations of a batch's mean length that the rows have room for


@dataclass(frozen=True)
class Packing:
    """Packs the captions of each batch into `text.rows` rows of `text.row_tokens` tokens.

    A batch that needs longer rows gets them, and the step is compiled once more. With several processes this is an
    error, because the other processes would not know.
    """

    text: TextConfig  # from `with_rows`
    texts: int  # per device
    eos_id: int
    mean_tokens: float  # per caption
    devices: int  # of this process
    all_devices: int

    @property
    def rows(self) -> int:
        """Per device."""
        return self.text.rows // self.all_devices

    @property
    def description(self) -> str:
        """For the terminal."""
        captions, tokens = self.texts / self.rows, self.text.row_tokens
        return (
            f"{captions:.1f} captions of {self.mean_tokens:.1f} tokens on average share a row of {tokens}, "
            f"{1 - captions * self.mean_tokens / tokens:.0%} of it padding"
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Replace the ids int [n, length] of a batch.

        Returns:
          The batch with ids int [rows, row_tokens], lengths uint16 [rows, k] and slots int32 [n], where rows are those
          of all devices of this process. Slots are counted from the first caption of each device.

        Raises:
          UserError: the batch needs longer rows and there are several processes.
        """
        lengths = true_lengths(batch["ids"], self.eos_id).reshape(self.devices, -1)
        # The last position of each device is a caption of no token.
        end = (0, 1)
        ids = np.pad(batch["ids"].reshape(*lengths.shape, -1), ((0, 0), end, (0, 0)))
        tables = np.stack([assign_rows(part, self.rows).ravel() for part in lengths])
        slots = np.empty((self.devices, self.texts + 1), np.int32)
        np.put_along_axis(slots, tables, np.arange(tables.shape[1], dtype=np.int32)[None], axis=1)
        sizes = np.take_along_axis(np.pad(lengths, ((0, 0), end)), tables, axis=1)
        sizes = sizes.reshape(self.devices * self.rows, -1)
        order = (tables + np.arange(self.devices)[:, None] * (self.texts + 1)).ravel()
        tokens = self._fit_row_tokens(int(sizes.sum(axis=1).max()), lengths)
        return batch | {
            "ids": pack_ids(ids.reshape(-1, ids.shape[2])[order], sizes, tokens, self.eos_id),
            "lengths": sizes.astype(np.uint16),
            "slots": slots[:, :-1].ravel(),
        }

    def _fit_row_tokens(self, required: int, lengths: np.ndarray) -> int:
        """Return `row_tokens`, or more if a batch of these lengths requires it."""
        tokens = self.text.row_tokens
        if required > tokens and self.devices < self.all_devices:
            rows = max(required_rows(part, self.texts, tokens, _row_multiple(self.text)) for part in lengths)
            raise UserError(
                f"the captions of a batch need rows of {required} tokens, more than the planned {tokens}; rerun "
                f"with --text.rows {rows * self.all_devices}"
            )
        while tokens < required:  # in large steps, because each length is compiled
            tokens = _round_up(tokens * 17 / 16, _SUBLANES)
        return tokens


def true_lengths(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Return the tokens int64 [n] up to the first end-of-sentence, inclusive, of ids [n, length]; all without one."""
    end = ids == eos_id
    first = end.argmax(axis=1)
    return np.where(end[np.arange(len(ids)), first], first + 1, ids.shape[1])


def assign_rows(lengths: np.ndarray, rows: int) -> np.ndarray:
    """Assign captions to rows: return positions int64 [rows, k] in `lengths` [n], k = n / rows, rounded up.

    From the longest to the shortest, each caption goes to the row with the fewest tokens that has a place. Then the
    longest rows exchange captions with the shortest ones. Places that are left have the position n.
    """
    n = len(lengths)
    table = np.full((rows, -(-n // rows)), n)
    tokens, count = np.zeros(rows, lengths.dtype), np.zeros(rows, np.int64)
    order, done = np.argsort(-lengths, kind="stable"), 0
    while done < n:
        # Several captions at once: to the rows that would remain the emptiest while these get one each.
        open_rows = np.flatnonzero(count < table.shape[1])
        open_rows = open_rows[np.argsort(tokens[open_rows], kind="stable")]
        limit = tokens[open_rows[0]] + lengths[order[done]]
        captions = order[done : done + np.searchsorted(tokens[open_rows], limit)]
        chosen = open_rows[: len(captions)]
        table[chosen, count[chosen]] = captions
        tokens[chosen] += lengths[captions]
        count[chosen] += 1
        done += len(captions)
    half, lengths = rows // 2, np.append(lengths, 0)
    for _ in range(_EXCHANGES):
        order = np.argsort(tokens, kind="stable")
        short, long = order[:half], order[::-1][:half]
        gap, ours, theirs = tokens[long] - tokens[short], lengths[table[long]], lengths[table[short]]
        left = np.abs(gap[:, None, None] - 2 * (ours[:, :, None] - theirs[:, None, :]))
        left = left.reshape(half, table.shape[1] ** 2)
        a, b = np.divmod(left.argmin(axis=1), table.shape[1])
        less = left.min(axis=1) < gap
        long, short, a, b = long[less], short[less], a[less], b[less]
        table[long, a], table[short, b] = table[short, b], table[long, a]
        tokens = lengths[table].sum(axis=1)
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


def open_packing(config: Config, tokens: Tokens, tokenizer: Tokenizer, mesh: Mesh) -> Packing:
    """Return the packing of a run, with the rows that a sample of the captions requires.

    Raises:
      UserError: `text.row_tokens` is less than a caption may need.
    """
    lengths = sampled_lengths(tokens, tokenizer.eos_id)
    texts = config.stream.global_batch * config.stream.captions_per_image // mesh.size
    text = with_rows(config.text, lengths, texts, tokenizer.max_length, mesh.size)
    return Packing(text, texts, tokenizer.eos_id, float(lengths.mean()), len(mesh.local_devices), mesh.size)


def with_rows(text: TextConfig, lengths: np.ndarray, texts: int, max_length: int, devices: int) -> TextConfig:
    """Return the configuration with `row_tokens` and `rows`, where they are 0, as captions packed by length require.

    Args:
      lengths: int [m], of a representative sample of the captions.
      texts: captions of a device in one step.
      max_length: of a caption, in tokens.
      devices: of the run.

    Raises:
      UserError: `row_tokens` is less than `max_length`.
    """
    tokens = text.row_tokens or _row_tokens(text.pack * lengths.mean(), max_length)
    if tokens < max_length:
        raise UserError(
            f"text.row_tokens {tokens} is less than a caption of {max_length} tokens needs; use {max_length} or more"
        )
    rows = text.rows or devices * required_rows(lengths, texts, tokens, _row_multiple(text))
    return replace(text, row_tokens=tokens, rows=rows)


def _row_tokens(tokens: float, max_length: int) -> int:
    """Return a row length near `tokens`, and at least `max_length`, that fills registers."""
    if max(tokens, max_length) <= _SHORT:
        return _round_up(max(tokens, max_length), _SUBLANES)
    return max(_LANES * round(tokens / _LANES), _round_up(max_length, _LANES))


def _row_multiple(text: TextConfig) -> int:
    """Return what the rows of a device must be a multiple of."""
    return 1 if text.keep == "auto" else text.microbatches


def sampled_lengths(tokens: Tokens, eos_id: int) -> np.ndarray:
    """Return the true lengths int64 [m] of captions of evenly spaced blocks.

    Every row contributes the same number of captions, as in batches.
    """
    blocks, reader = tokens.dataset.blocks, tokens.reader()
    sample = np.linspace(0, blocks - 1, min(blocks, _SAMPLE_BLOCKS)).astype(int)
    captions = read_captions(tokens, (reader.read(int(b)) for b in np.unique(sample)))
    rows = np.flatnonzero(np.diff(captions.starts))
    return true_lengths(captions.choose(rows, rows, np.zeros_like(rows), _SAMPLE_CAPTIONS, 0), eos_id)


def required_rows(lengths: np.ndarray, texts: int, row_tokens: int, multiple: int = 1) -> int:
    """Return the number of rows of a device that practically every batch fits in, one that can be divided well.

    Args:
      lengths: int [m], of a representative sample of the captions, none longer than a row.
      texts: captions of a device in one step.
      row_tokens: length of a row.
      multiple: of the result.
    """
    # A batch with the quantiles and the longest caption of the sample, each somewhat longer: some batches have longer
    # captions on average.
    batch = np.quantile(lengths, (np.arange(texts) + 0.5) / texts)
    batch = np.minimum(batch + _DEVIATIONS * lengths.std() / texts**0.5, lengths.max())
    batch[-1] = lengths.max()
    rows = math.ceil(batch.sum() / row_tokens)
    unit = 1 << max(0, rows.bit_length() - 4)  # 8 to 15 units: rows have divisors, for microbatches
    unit = unit if unit % multiple == 0 else multiple
    rows = _round_up(rows, unit)
    while np.append(batch, 0)[assign_rows(batch, rows)].sum(axis=1).max() > row_tokens:
        rows += unit
    return rows


def _round_up(tokens: float, multiple: int) -> int:
    return math.ceil(tokens / multiple) * multiple
