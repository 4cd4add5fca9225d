"""The training loop, from a configuration to the last checkpoint."""

from __future__ import annotations

import math
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lit_fast.checkpoint import abstract, open_manager, restore, save
from lit_fast.config import Config
from lit_fast.dataset import open_dataset
from lit_fast.errors import UserError
from lit_fast.features import open_features
from lit_fast.mesh import dealt, make_mesh
from lit_fast.progress import Progress, duration
from lit_fast.run import init_params, text_embedder, text_tower
from lit_fast.tokens import open_tokens
from train.evaluation import Evaluation
from train.flops import step_flops
from train.meter import Meter
from train.metrics import MetricsWriter
from train.optimizer import make_optimizer
from train.step import Metrics, State, init_state, make_step
from train.stream import Batch, Stream, open_stream
from train.workdir import check_identity, check_workdir, write_receipt, write_workdir


def train(config: Config, run: Path) -> None:
    """Train, or go on training, in the run directory.

    Raises:
      UserError: the configuration, the dataset and the run directory do not fit each other, or the run
        went non-finite.
      SystemExit: after SIGTERM (143) or Ctrl-C (130), with everything saved.
    """
    # --- whatever can be wrong is found before anything is written or compiled
    if not config.dataset:
        raise UserError("no dataset: give --dataset D, or the key dataset in the config")
    dataset = open_dataset(config.dataset)
    features = open_features(dataset, config.tower)
    tokens = open_tokens(dataset, config.tokenizer)
    tokenizer = tokens.tokenizer()
    if jax.process_count() > 1:
        raise UserError("training with several processes is not supported; run it on the devices of one host")
    mesh = make_mesh()
    batch = config.stream.global_batch
    if batch % mesh.size:
        raise UserError(f"stream.global_batch {batch} is not divisible by the {mesh.size} devices")
    pairs = batch * config.stream.captions_per_image
    if pairs % (mesh.size * config.text.parts):
        raise UserError(
            f"the {pairs} texts of a batch are not divisible by text.parts {config.text.parts} x {mesh.size} devices"
        )
    check_workdir(run, config)
    check_identity(run, "tower", features.identity)
    check_identity(run, "tokens", tokenizer.identity)
    evaluation = Evaluation(config.evaluate, features.provenance)
    stream = open_stream(features, tokens, config.stream, config.seed)
    check_identity(run, "stream", stream.identity)
    _say(f"dataset {dataset.path}: {stream.description}")

    # --- model, optimizer, state
    model = text_tower(config.text, tokenizer, features.width)
    mean = features.mean(features.invalid_rows()) if config.loss.center else np.zeros(features.width)
    evaluation.prepare(mean.astype(np.float32))
    params = init_params(model, config, mean)
    optimizer = make_optimizer(config.optimizer, config.steps, params)
    state = init_state(params, optimizer, mesh)
    count = sum(p.size for p in jax.tree.leaves(state.params["txt"]))
    _say(f"text tower: {count / 1e6:.1f} M parameters on {mesh.size} x {jax.devices()[0].device_kind}")

    # --- the run directory
    write_workdir(run, config, features, tokens, stream)
    checkpoints = Checkpoints(run, config.checkpoint.keep)
    done = checkpoints.last()
    if done:
        state = checkpoints.restore(done, state)
        _say(f"going on after step {done:,}")
    embed_text = text_embedder(model, tokenizer, mesh)
    if done >= config.steps:
        if not (run / "receipt.json").exists():  # killed after the last checkpoint
            write_receipt(run, config, stream, evaluation.run(partial(embed_text, state.params)))
        print(f"{run} is complete: {done:,} steps")
        return

    # --- the loop
    meter = Meter(pairs, step_flops(model, pairs, batch), mesh.size, start=done)
    _loop(
        config, state, done, stream, mesh,
        step=make_step(model, optimizer, config, mesh),
        embed_text=embed_text,
        meter=meter, writer=MetricsWriter(run, done), checkpoints=checkpoints, evaluation=evaluation,
    )  # fmt: skip

    # --- the end
    write_receipt(run, config, stream, evaluation.results)
    print(f"trained {config.steps:,} steps in {duration(meter.seconds)}; the run is in {run}")
    if evaluation.results:
        print(evaluation.table())
    else:
        print(f"evaluate it with: lit-fast eval {run} --zero-shot E --retrieval E")


def _loop(
    config: Config,
    state: State,
    done: int,
    stream: Stream,
    mesh: Mesh,
    *,
    step: Any,
    embed_text: Any,
    meter: Meter,
    writer: MetricsWriter,
    checkpoints: Checkpoints,
    evaluation: Evaluation,
) -> None:
    stop = _Stop()
    progress = Progress("train", config.steps, "steps", start=done)
    batches = stream.iterate(done)
    batch = _to_devices(next(batches), mesh)
    unread: tuple[int, Metrics] | None = None  # fetched a step late, so that the devices never idle for it
    note = ""
    before: Metrics | None = None
    try:
        for number in range(done + 1, config.steps + 1):
            state, metrics = step(state, batch)
            if number < config.steps:
                with meter.waiting:
                    arrays = next(batches)
                batch = _to_devices(arrays, mesh)
            # Two steps in flight keep the devices busy. More would hold a batch each, make a signal wait for all
            # of them, and count as waiting for data what the devices spend computing.
            jax.block_until_ready(before)
            before = metrics
            stopping = stop.signal is not None  # read once: a signal after this stops the next step
            last = number == config.steps or stopping
            evaluating = evaluation.due(number, config.steps)
            saving = last or number % config.checkpoint.every_steps == 0
            if unread is not None:
                note, unread = _log(writer, meter, *unread), None
            if number % config.log.every_steps == 0 or number in (1, config.steps) or evaluating:
                unread = (number, metrics)
            if saving or evaluating:
                if unread is not None:
                    note, unread = _log(writer, meter, *unread), None
                with meter.paused:
                    checkpoints.check(state)
                    if evaluating:  # before saving: who is killed in between does both again
                        evaluation.run(partial(embed_text, state.params))
                        writer.write(number, evaluation.figures())
                    if saving:
                        checkpoints.save(number, state)
            elif note == _NOT_FINITE:
                checkpoints.check(state)
            progress.advance(1, note)
            if stopping:
                break
    finally:  # whatever happens: what is being saved is saved
        checkpoints.close()
        writer.close()
    progress.close(note)
    if stop.signal is not None and stopping and number < config.steps:
        _say(f"stopped after step {number:,} and saved; the same command goes on from there")
        raise SystemExit(128 + stop.signal)


_NOT_FINITE = "loss is not finite"


def _log(writer: MetricsWriter, meter: Meter, number: int, metrics: Metrics) -> str:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    writer.write(number, values | meter.read(number))
    return f"loss {values['loss']:.4f}" if math.isfinite(values["loss"]) else _NOT_FINITE


class Checkpoints:
    """The checkpoints of one run: state of the training and position of its stream."""

    def __init__(self, run: Path, keep: int) -> None:
        self._run = run
        self._manager = open_manager(run, keep=keep)

    def last(self) -> int:
        """Step of the last committed checkpoint; 0: none."""
        return self._manager.latest_step() or 0

    def save(self, number: int, state: State) -> None:
        """Begin to save; the writing goes on in the background."""
        save(self._manager, number, state.params, _rest(state), {"next_batch": number})

    def restore(self, number: int, state: State) -> State:
        """The state after step `number`, in the layout of `state`."""
        params, rest, _ = restore(self._manager, number, abstract(state.params), abstract(_rest(state)))
        return State(params, **rest)

    def check(self, state: State) -> None:
        """Raises UserError if a step was not finite; such a state is never saved."""
        bad = int(state.bad_step)
        if bad >= 0:
            self._manager.wait_until_finished()
            raise UserError(
                f"loss or gradient became non-finite at step {bad + 1}; the last good checkpoint of {self._run} "
                f"is step {self.last()}; try a lower optimizer.learning_rate in another --workdir"
            )

    def close(self) -> None:
        """Wait until everything is on the disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _rest(state: State) -> dict[str, Any]:
    return {"opt": state.opt, "step": state.step, "bad_step": state.bad_step}


class _Stop:
    """Remembers that SIGTERM or Ctrl-C came; the step in hand is finished and saved first."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: now
            raise SystemExit(128 + number)
        self.signal = number


def _to_devices(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    sharding = dealt(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
