"""Train the same configuration on the features of several towers, with several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lit_fast.config import Config
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import stored_towers
from lit_fast.errors import UserError
from lit_fast.report.compare import Record, read_records
from lit_fast.storage.paths import StrPath, join
from lit_fast.train.loop import train
from lit_fast.train.tracking.receipt import is_finished
from lit_fast.utils.output import status


def race(config: Config, directory: StrPath, towers: Sequence[str], seeds: int) -> dict[str, list[Record]]:
    """Train a run for each tower and seed, or resume it; finished ones are kept.

    The runs are `directory/TOWER-SEED`, with seeds from that of the configuration on.

    Returns:
      The runs of each tower, by seed.

    Raises:
      UserError: the dataset has no features of a tower, or a training fails.
    """
    stored = stored_towers(open_dataset(config.dataset))
    if missing := [tower for tower in towers if tower not in stored]:
        raise UserError(
            f"dataset {config.dataset} has no features {missing[0]!r}, only {', '.join(stored) or 'none'}; make them "
            f"with: lit-fast embed {config.dataset} --tower TOWER --name {missing[0]}"
        )
    if len(set(towers)) < len(towers):
        raise UserError("--towers names a tower twice; name each once")
    runs: dict[str, list[str]] = {
        tower: [join(directory, f"{tower}-{config.seed + i}") for i in range(seeds)] for tower in towers
    }
    # Seeds outside: after a part of the time there is a result of every tower.
    for i in range(seeds):
        for tower in towers:
            workdir = runs[tower][i]
            if is_finished(workdir):
                continue
            status(f"race: tower {tower}, seed {config.seed + i}")
            train(replace(config, tower=tower, seed=config.seed + i), workdir)
    return {tower: read_records(workdirs) for tower, workdirs in runs.items()}
