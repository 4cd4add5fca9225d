"""Weights & Biases beside `metrics.jsonl`; whatever goes wrong with it, the training goes on."""

from __future__ import annotations

import importlib.util
import sys
import uuid
from pathlib import Path
from typing import Any

from lit_fast.config import Config, flatten
from lit_fast.errors import UserError
from lit_fast.storage.files import read_object, write_json

# What was not sent in time stays in W/wandb; a machine that is taken away gives hardly more time.
_START_SECONDS, _FINISH_SECONDS = 30.0, 20.0
_WITHOUT = "going on without, metrics.jsonl has everything"


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
        file = run / "wandb.json"
        if not file.is_file():
            write_json(file, {"id": uuid.uuid4().hex[:8]})
        identity = read_object(file, "id")["id"]
        self._run: Any = None
        try:
            self._run = _start(run, config, identity, None)
        except Exception as error:  # it has many of its own, and those of the network
            _warn(error, f"it is kept in {run / 'wandb'}, for `wandb sync`")
            try:
                import wandb

                wandb.teardown()  # it holds the id of the run that it could not begin
                self._run = _start(run, config, identity, "offline")
            except Exception as error:
                _warn(error, _WITHOUT)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Figures after `step` updates; steps that an earlier part has sent already are not sent again."""
        try:
            if self._run is not None:
                self._run.log(values, step=step)
        except Exception as error:
            self._run = None
            _warn(error, _WITHOUT)

    def close(self) -> None:
        """Send what is left."""
        try:
            if self._run is not None:
                import wandb

                self._run.finish()
                wandb.teardown()  # only now everything is in W/wandb
        except Exception as error:
            _warn(error, f"what was not sent is in {self._run.dir}")


def _start(run: Path, config: Config, identity: str, mode: Any) -> Any:
    import wandb

    return wandb.init(
        project=config.log.wandb,
        name=run.resolve().name,
        id=identity,
        resume="allow",
        mode=mode,
        dir=str(run),
        config=flatten(config),
        settings=wandb.Settings(
            silent=True,
            console="off",
            login_timeout=_START_SECONDS,
            init_timeout=_START_SECONDS,
            finish_timeout=_FINISH_SECONDS,
        ),
    )


def _warn(error: Exception, then: str) -> None:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    print(f"warning: wandb: {reason}; {then}", file=sys.stderr)
