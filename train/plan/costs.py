"""Costs of a run beside its steps: embedding, storage, checkpoints; and the prices of chips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lit_fast.config import Config
from lit_fast.data.tokens import id_dtype
from lit_fast.errors import UserError
from lit_fast.train.cost.hardware import TPUS
from lit_fast.train.plan.candidates import Candidate, Planner
from lit_fast.train.plan.image import PHOTOS_PER_CORE
from lit_fast.train.plan.slices import canonical
from lit_fast.train.plan.target import Target

STORAGE_PRICE = 0.02  # USD per GB and month: Google's list price of standard storage in us-central1, 2025


class Prices:
    """Prices of a chip per hour in USD, from the values of `--price`: `3.22`, or `v4=3.22,h200=3.5`.

    A name is that of a slice, in any form, or of a chip.

    Raises:
      UserError: a price is not a number, or a name is unknown.
    """

    def __init__(self, values: Sequence[str] = ()) -> None:
        self._prices: dict[str, float] = {}
        for part in (part.strip() for value in values for part in value.split(",")):
            name, _, number = part.rpartition("=")
            try:
                price = float(number)
            except ValueError:
                price = math.nan
            if not 0 <= price < math.inf:
                raise UserError(
                    f"--price {part}: {number!r} is not a price in USD; write 3.22 or v4=3.22,h200=3.5"
                )
            self._prices[_price_key(name)] = price
        self._used: set[str] = set()

    def of(self, target: Target) -> float:
        """Return the price of a chip of the target per hour; 0: unknown."""
        for key in (target.topology, target.chip.name, ""):
            if key in self._prices:
                self._used.add(key)
                return self._prices[key]
        return 0.0

    def unused(self) -> list[str]:
        """Return the names whose price no target asked for."""
        return [name for name in self._prices if name and name not in self._used]


def _price_key(name: str) -> str:
    """Return the canonical name of a slice, or the name of a chip; a single GPU means any number of them."""
    name = name.strip().lower()
    if not name or any(name == chip.name for chip in TPUS):
        return name
    kind, _, rest = canonical(name, "--price").partition(":")
    return rest if kind == "gpu" and ":" not in rest else f"{kind}:{rest}" if rest else kind


def data_costs(planner: Planner, candidate: Candidate, seconds: float, mfu: float) -> dict[str, Any]:
    """Return the sizes of features and checkpoints and the time to embed, for a million rows where none are known.

    Args:
      seconds: of a step.
      mfu: share of the peak at which the images are embedded.
    """
    data, target, config = planner.data, planner.target, planner.config
    rows, captions = data.rows or 1_000_000, config.stream.captions_per_image
    peak = target.chip.flops * target.devices
    id_bytes = data.vocabulary.max_length * id_dtype(data.vocabulary.vocab_size).itemsize
    memory = planner.memory(candidate.text)
    saves = -(-config.steps // config.checkpoint.every_steps)
    kept = min(config.checkpoint.keep, saves)
    if config.checkpoint.keep_every:
        kept += config.steps // config.checkpoint.keep_every
    image_bytes = 3 * planner.image.size**2 if planner.image else data.width * 2
    row_bytes, rate = image_bytes + captions * id_bytes, config.stream.global_batch / seconds
    return {
        "rows": rows,
        "known": bool(data.rows),
        "bytes": 0 if planner.image else rows * data.views * data.width * 2,
        "cores_per_host": rate / target.hosts / PHOTOS_PER_CORE if planner.image else None,
        "token_bytes": rows * id_bytes,
        "row_bytes": row_bytes,
        "rows_per_second": rate,
        "bytes_per_second": rate * row_bytes,
        "embedding_seconds": rows * data.image_flops / (peak * mfu) if data.image_flops else None,
        "passes": config.steps * config.stream.global_batch / data.rows if data.rows else None,
        "checkpoint_bytes": memory.parameters + memory.optimizer,
        "checkpoint_saves": saves,
        "checkpoints_kept": kept,
        "evaluations": _evaluations(config),
    }


def usd(
    planner: Planner, store: dict[str, Any], seconds: float, price: float, storage: float
) -> dict[str, float]:
    """Return prices in USD.

    Args:
      store: of `data_costs`.
      seconds: of a step.
      price: of a chip per hour.
      storage: of a GB per month.
    """
    chip_seconds = planner.target.devices * price / 3600
    stored = store["bytes"] + store["token_bytes"] + store["checkpoints_kept"] * store["checkpoint_bytes"]
    return {
        "training": planner.config.steps * seconds * chip_seconds,
        "embedding": (store["embedding_seconds"] or 0.0) * chip_seconds,
        "storage_per_month": stored / 1e9 * storage,
    }


def _evaluations(config: Config) -> int:
    """Return about how often a run evaluates: at its shortest interval, and after the last step."""
    evaluate, steps = config.evaluate, config.steps
    if not evaluate.zero_shot and not evaluate.retrieval:
        return 0
    intervals = (
        evaluate.every_steps,
        evaluate.every_examples / config.stream.global_batch,
        evaluate.every_share * steps,
    )
    return math.ceil(steps / min((every for every in intervals if every), default=steps))
