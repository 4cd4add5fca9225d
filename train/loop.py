"""The training loop, from a configuration to the last checkpoint."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.models.two_towers import init_params, text_embedder, text_tower
from lit_fast.runs.metrics import Spent
from lit_fast.runtime import batch_sharding, make_mesh, replicated
from lit_fast.train.checkpoints import Checkpoints
from lit_fast.train.cost.flops import step_flops
from lit_fast.train.cost.memory import Fit, fit
from lit_fast.train.evaluator import Evaluation
from lit_fast.train.input_pipeline.stream import Batch
from lit_fast.train.inputs import Inputs, open_inputs
from lit_fast.train.step import Metrics, State, abstract_training, init_state, make_step
from lit_fast.train.tracking.console import Console, _report, _say
from lit_fast.train.tracking.metrics_writer import MetricsWriter
from lit_fast.train.tracking.profiler import Profile, parse_steps
from lit_fast.train.tracking.receipt import is_finished, spent_before, write_receipt
from lit_fast.train.tracking.report import write_report
from lit_fast.train.tracking.throughput import Meter
from lit_fast.train.tracking.wandb import check_wandb
from lit_fast.train.workdir import check_start, lock_workdir, starting_params, write_start, write_workdir
from lit_fast.utils.progress import duration


def train(config: Config, run: Path, profile_steps: str = "") -> None:
    """Train, or go on training, in the run directory.

    Args:
      profile_steps: A:B, steps to write a profile of; empty: none.

    Raises:
      UserError: the configuration, the dataset and the run directory do not fit each other, or the run
        went non-finite.
      SystemExit: after SIGTERM (143) or Ctrl-C (130), with everything saved.
    """
    began = time.monotonic()
    # --- whatever can be wrong is found before anything is written or compiled
    profiled = parse_steps(profile_steps, config.steps)
    check_wandb(config)
    mesh = make_mesh()
    inputs = open_inputs(config, run, mesh)
    features, stream, evaluation = inputs.features, inputs.stream, inputs.evaluation
    _say(f"dataset {features.dataset.path}: {stream.description}")
    packing, text = inputs.packing, config.text
    if packing:
        _say(packing.description)
        text = replace(text, row_tokens=packing.row_tokens)

    # --- model, optimizer, state
    tower = partial(text_tower, tokenizer=inputs.tokenizer, out_dim=features.width)
    optimizer, abstract_state = abstract_training(tower(text), config)
    fitted = fit(replace(config, text=text), tower, mesh, optimizer, abstract_state)
    _say(f"memory: {fitted.description}")
    model = tower(fitted.text)
    mean = inputs.mean(config.loss.center)
    evaluation.prepare(mean)
    params, begun = starting_params(run, config.text.init, init_params(model, config, mean))
    if begun:
        _say(f"starting from {begun['source']}: {begun['taken']}")
    state = init_state(params, optimizer, mesh, config.optimizer.average_decay > 0)
    del params  # the state has its own
    count = sum(p.size for p in jax.tree.leaves(state.params["txt"]))
    _say(f"text tower: {count / 1e6:.1f} M parameters on {mesh.size} x {jax.devices()[0].device_kind}")

    # --- the run directory
    lock = _begin(run, config, inputs, begun)
    checkpoints = Checkpoints(run, config.checkpoint)
    done, state = checkpoints.restore_last(state)
    check_start(run, config.text.init, done, begun)
    if done:
        _say(f"going on after step {done:,}")
    first = jax.process_index() == 0
    before = spent_before(run)
    embed_text = text_embedder(model, inputs.tokenizer, mesh)
    if done >= config.steps:
        if not is_finished(run):  # killed after the last checkpoint
            results = evaluation.run(embed_text, state.params, state.average)
            _conclude(run, config, fitted, done, before, results)
        _report(f"{run} is complete: {done:,} steps")
        return

    # --- the loop
    writer = MetricsWriter(run, config, done, before) if first else None
    batch = config.stream.global_batch
    pairs = batch * config.stream.captions_per_image
    flops = step_flops(model, pairs, batch, config.loss.image_head, packing.tokens if packing else None)
    meter = Meter(pairs, flops, mesh.size, start=done, before=before, began=began)
    done, stopping = _loop(
        config, state, done, stream.iterate(done, packing or (lambda batch: batch)), mesh,
        step=make_step(model, optimizer, replace(config, text=fitted.text), mesh),
        embed_text=embed_text,
        meter=meter, writer=writer, console=Console(config.steps, done) if first else None,
        checkpoints=checkpoints, evaluation=evaluation, profile=Profile(run, profiled, done, meter.paused),
    )  # fmt: skip

    # --- the end
    _conclude(run, config, fitted, done, meter.spent(), evaluation.results)
    if done < config.steps:
        _say(f"stopped after step {done:,} and saved; the same command goes on from there")
        raise SystemExit(128 + stopping)
    _report(f"trained {config.steps:,} steps in {duration(meter.spent().seconds)}; the run is in {run}")
    if evaluation.results:
        _report(evaluation.table())
    else:
        _report(f"evaluate it with: lit-fast eval {run} --zero-shot E --retrieval E")
    lock.close()


def _begin(run: Path, config: Config, inputs: Inputs, begun: dict[str, Any] | None) -> IO[str]:
    """Lock the run directory and write down what the run is made of, once all processes have checked it."""
    lock = lock_workdir(run)
    sync_global_devices("checked")  # no process writes before all have found the directory in order
    if jax.process_index() == 0:
        write_workdir(run, config, inputs.features, inputs.tokens, inputs.stream)
        if begun:
            write_start(run, begun)
    sync_global_devices("written")
    return lock


def _conclude(
    run: Path, config: Config, fitted: Fit, done: int, taken: Spent, results: list[dict[str, Any]]
) -> None:
    """Write down what the run was and found."""
    if jax.process_index() == 0:
        write_receipt(run, config, fitted, done, taken, results)
        write_report(run)


def _loop(
    config: Config,
    state: State,
    done: int,
    batches: Iterator[Batch],
    mesh: Mesh,
    *,
    step: Any,
    embed_text: Any,
    meter: Meter,
    writer: MetricsWriter | None,  # of the first process, like the console
    console: Console | None,
    checkpoints: Checkpoints,
    evaluation: Evaluation,
    profile: Profile,
) -> tuple[int, int]:
    """The number of completed steps, and the signal that stopped it, 0 for none."""
    stop = _Stop(mesh)
    with meter.paused:
        batch = _to_devices(next(batches), mesh)
    unread: tuple[int, Metrics] | None = None  # fetched a step late, so that the devices never idle for it
    before: Metrics | None = None
    try:
        for number in range(done + 1, config.steps + 1):
            profile.begin(number, state)
            compiling = meter.paused if number == done + 1 else nullcontext()
            with compiling, jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = step(state, batch)
            profile.end(number, metrics)
            if number < config.steps:
                with meter.waiting:
                    arrays = next(batches)
                batch = _to_devices(arrays, mesh)
            # Two steps in flight keep the devices busy. More would hold a batch each, make a signal wait for all
            # of them, and count as waiting for data what the devices spend computing.
            jax.block_until_ready(before)
            before = metrics
            stopping = stop.agreed()  # read once: a signal after this stops the next step
            last = number == config.steps or stopping
            evaluating = evaluation.due(number)
            saving = last or number % config.checkpoint.every_steps == 0
            finite = True
            if unread is not None:
                finite, unread = _log(writer, console, meter, *unread), None
            if number % config.log.every_steps == 0 or number in (1, config.steps) or evaluating:
                unread = (number, metrics)
            if saving or evaluating:
                if unread is not None:
                    _, unread = _log(writer, console, meter, *unread), None
                with meter.paused:
                    checkpoints.check(state)
                    if evaluating:  # before saving: who is killed in between does both again
                        evaluation.run(embed_text, state.params, state.average)
                        if writer:
                            writer.write(number, evaluation.figures())
                    if saving:
                        checkpoints.save(number, state, evaluation.figures() if evaluating else {})
            elif not finite:
                checkpoints.check(state)
            if console:
                console.advance()
            if stopping:
                break
    finally:  # whatever happens: what is being saved is saved
        checkpoints.close()
        profile.close()
        if console:
            console.close()
        if writer:
            writer.close()
    return number, stopping


def _log(
    writer: MetricsWriter | None, console: Console | None, meter: Meter, number: int, metrics: Metrics
) -> bool:
    """Whether the loss is finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    values |= meter.read(number)
    if writer:
        writer.write(number, values)
    if console:
        console.log(number, values)
    return math.isfinite(values["loss"])


class _Stop:
    """Remembers that SIGTERM or Ctrl-C came; the step in hand is finished and saved first."""

    def __init__(self, mesh: Mesh) -> None:
        self._signal, self._mesh = 0, mesh
        self._most = jax.jit(jnp.max, out_shardings=replicated(mesh))
        self._asked: deque[jax.Array] = deque()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal:  # asked twice: now
            raise SystemExit(128 + number)
        self._signal = number

    def agreed(self) -> int:
        """The signal, 0 for none; to be asked once a step, in every process.

        All processes must stop after the same step, so of several processes each tells the others, and they
        act on what was told two steps ago, which is known without waiting.
        """
        if jax.process_count() == 1:
            return self._signal
        told = np.full(jax.local_device_count(), self._signal, np.int32)
        told = jax.make_array_from_process_local_data(batch_sharding(self._mesh), told)
        self._asked.append(self._most(told))
        return int(self._asked.popleft()) if len(self._asked) > 2 else 0


def _to_devices(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
