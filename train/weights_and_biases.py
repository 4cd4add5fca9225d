"""Weights & Biases beside `metrics.jsonl`; whatever goes wrong with it, the training goes on."""

from __future__ import annotations

import importlib.util
import sys
import uuid
from pathlib import Path
from typing import Any

from lit_fast.config import Config, flatten
from lit_fast.errors import UserError
from lit_fast.files import read_object, write_json

_FINISH_SECONDS = 20.0  # what is not sent by then stays in W/wandb, for `wandb sync`


def check_wandb(config: Config) -> None:
    """Raises UserError where it is wanted and not installed."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            'log.wandb needs the package wandb: pip install "lit-fast[wandb]", or leave log.wandb empty'
        )


class WeightsAndBiases:
    """The run of the project `log.wandb`, the same one in every part; its id is in W/wandb.json.

    Modes, keys and servers are what wandb's own environment variables say, such as WANDB_MODE=offline.
    """

    def __init__(self, run: Path, config: Config) -> None:
        import wandb

        file = run / "wandb.json"
        if not file.is_file():
            write_json(file, {"id": uuid.uuid4().hex[:8]})
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                name=run.resolve().name,
                id=read_object(file, "id")["id"],
                resume="allow",
                dir=str(run),
                config=flatten(config),
                settings=wandb.Settings(silent=True, console="off", finish_timeout=_FINISH_SECONDS),
            )
        except Exception as error:  # it has many of its own, and those of the network
            _warn(error)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Figures after `step` updates; steps that an earlier part has sent already are not sent again."""
        try:
            if self._run is not None:
                self._run.log(values, step=step)
        except Exception as error:
            self._run = None
            _warn(error)

    def close(self) -> None:
        """Send what is left, for twenty seconds at most: a machine that is taken away gives no more."""
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:
            _warn(error)


def _warn(error: Exception) -> None:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    print(f"warning: wandb: {reason}; going on without, metrics.jsonl has everything", file=sys.stderr)
