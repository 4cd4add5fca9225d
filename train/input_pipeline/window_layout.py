"""Which blocks a window of `window_shuffle` holds, and which window a step reads: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from lit_fast.config import StreamConfig
from lit_fast.data.dataset import BLOCK
from lit_fast.errors import UserError


@dataclass(frozen=True)
class WindowLayout:
    """The division of an epoch's blocks into streams and windows.

    The last rows of the dataset, less than a block, are never used. Up to `streams * unit` blocks are left out of each
    epoch, different ones each time.
    """

    blocks: int  # whole blocks of the dataset
    streams: int
    rows: int  # rows that a batch takes from one stream
    unit: int  # the number of blocks in a window is a multiple of this, so that no step reads two windows of a stream
    window: int  # blocks of a full window

    @property
    def length(self) -> int:
        """Blocks of one stream in one epoch."""
        return self.blocks // (self.streams * self.unit) * self.unit

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return self.length * BLOCK // self.rows

    def window_of(self, stream: int, step: int) -> tuple[tuple[int, int], int]:
        """Return the window of a stream that a step of an epoch reads.

        Returns:
          Begin and end of the window in the stream's list of blocks, and the first row of the step in the window.
        """
        block = step * self.rows // BLOCK // self.unit * self.unit
        first = min((stream * self.unit) % self.window + self.unit, self.length)  # length of the first window
        if block < first:
            begin, end = 0, first
        else:
            begin = first + (block - first) // self.window * self.window
            end = min(begin + self.window, self.length)
        return (begin, end), step * self.rows - begin * BLOCK


def plan_layout(rows: int, config: StreamConfig) -> WindowLayout:
    """Return the layout with the most streams, up to `stream.shuffle_streams`, that divides the batch evenly.

    Raises:
      UserError: there is none.
    """
    blocks, batch = rows // BLOCK, config.global_batch
    for streams in range(min(config.shuffle_streams, blocks, batch), 0, -1):
        share = batch // streams
        if batch % streams or (BLOCK % share and share % BLOCK):
            continue
        unit = max(1, share // BLOCK)
        if blocks >= streams * unit:
            window = -(-config.shuffle_window_blocks // unit) * unit
            return WindowLayout(blocks, streams, share, unit, window)
    raise UserError(
        f"a dataset of {rows:,} rows cannot be streamed in batches of {batch}; make stream.global_batch "
        f"a power of two of at most {blocks * BLOCK:,}, or raise stream.memory_gib to hold it in memory"
    )
