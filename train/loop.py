"""Train a model: from a configuration to the last checkpoint."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from itertools import chain
from signal import SIGTERM
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.models.two_towers import image_tower_params, init_params, text_embedder
from lit_fast.runs.metrics import RunCost
from lit_fast.runtime import batch_sharding, make_mesh, replicated
from lit_fast.storage.lock import Lock
from lit_fast.storage.paths import StrPath, is_bucket
from lit_fast.towers.dataset_features import DatasetEmbedder
from lit_fast.train.attention import write_attention
from lit_fast.train.checkpoints import Checkpoints
from lit_fast.train.cost.flops import step_flops
from lit_fast.train.evaluator import EmbedText, Evaluator
from lit_fast.train.input_pipeline.stream import Batch
from lit_fast.train.inputs import Inputs, check_run, open_inputs
from lit_fast.train.mirror import RunMirror
from lit_fast.train.optimizer import evaluation_params
from lit_fast.train.step import Metrics, State, init_state, with_parameter_norms
from lit_fast.train.step_builder import StepBuilder
from lit_fast.train.tracking.metrics_writer import TrainingLog
from lit_fast.train.tracking.profiler import Profiler, parse_profile_steps
from lit_fast.train.tracking.receipt import is_finished, read_cost, write_receipt
from lit_fast.train.tracking.report import write_report
from lit_fast.train.tracking.throughput import ThroughputMeter
from lit_fast.train.tracking.trackers import check_trackers
from lit_fast.train.workdir import (
    check_initial_params,
    choose_dtype,
    load_initial_params,
    lock_workdir,
    write_workdir,
)
from lit_fast.utils.format import format_duration
from lit_fast.utils.output import result, status
from lit_fast.utils.signals import record_signals


def train(config: Config, workdir: StrPath, profile_steps: str = "") -> None:
    """Train in a run directory, or resume the training there.

    Args:
      profile_steps: A:B, the steps to write a profile of; empty: none.

    Raises:
      UserError: configuration, dataset and run directory do not match, or a step was not finite.
      SystemExit: after SIGTERM (143) or Ctrl-C (130), with everything saved.
    """
    started = time.monotonic()
    workdir = os.fspath(workdir)

    # --- Check all inputs before anything is written or compiled.
    profiled = parse_profile_steps(profile_steps, config.steps)
    check_trackers(config)
    mesh = make_mesh()
    config = choose_dtype(config, workdir, mesh)
    inputs = open_inputs(config, workdir, mesh)
    lock = lock_workdir(workdir)
    with lock or nullcontext():
        check_run(workdir, config, inputs)  # again, as another training may have ended meanwhile
        if not is_bucket(workdir):
            _train(config, workdir, workdir, profiled, mesh, inputs, lock, None, started)
            return
        with RunMirror(workdir, lock) as mirror:
            _train(config, mirror.local, workdir, profiled, mesh, inputs, lock, mirror, started)


def _train(
    config: Config,
    workdir: str,
    shown_workdir: str,
    profiled: range,
    mesh: Mesh,
    inputs: Inputs,
    lock: Lock | None,
    mirror: RunMirror | None,
    started: float,
) -> None:
    """Train in a local run directory that this process, or the first one, has locked.

    Args:
      shown_workdir: the run directory in messages: that in a bucket of which `workdir` is a copy.
      lock: of `shown_workdir`; None in all processes but the first.
      mirror: writes the local run directory to the bucket, if it is a copy.
    """
    stream, packing, evaluator = inputs.stream, inputs.packing, inputs.evaluator
    status(f"dataset {inputs.dataset.path}: {stream.description}")
    if packing:
        status(packing.description)

    # --- Build the optimizer and the model, with the remat policy that fits in memory.
    builder = StepBuilder(config, inputs, mesh, workdir)

    # --- Initialize the parameters and the state.
    state, text_init = _first_state(workdir, config, inputs, builder, mesh)

    # --- Create the run directory, or resume from its last checkpoint.
    _create_workdir(workdir, config, inputs, text_init)
    checkpoints = Checkpoints(workdir, config.checkpoint, mirror)
    start_step, state = checkpoints.restore_last(state)
    check_initial_params(workdir, config.text.init, start_step, text_init)
    if start_step:
        status(f"resuming after step {start_step:,}")
    cost_before = read_cost(workdir)
    embed_text = text_embedder(builder.model, inputs.tokenizer, mesh)
    if start_step >= config.steps:
        if not is_finished(workdir):  # it was killed after the last checkpoint
            results = evaluator.run(embed_text, evaluation_params(state.opt, state.params), state.average)
            _write_summary(workdir, config, builder, start_step, cost_before, results)
            if mirror:
                mirror.push()
        result(f"{shown_workdir} is complete: {start_step:,} steps")
        return

    # --- Build the step. With attention kernels, compare them with XLA's form on the first batch.
    train_step = builder.make_step()
    batches = stream.iterate(start_step, packing or (lambda batch: batch))
    if builder.attention.form == "pallas":
        first = next(batches)
        batches = chain([first], batches)
        train_step = builder.with_checked_kernels(train_step, state, _to_devices(first, mesh))
        del first
    if jax.process_index() == 0:
        write_attention(workdir, builder.attention)

    # --- Train.
    meter = _meter(config, inputs, builder, mesh, start_step, cost_before, started)
    components = _Components(
        config=config,
        mesh=mesh,
        train_step=with_parameter_norms(train_step, mesh),
        batches=batches,
        evaluator=evaluator,
        embed_text=embed_text,
        checkpoints=checkpoints,
        meter=meter,
        log=TrainingLog(workdir, config, start_step, cost_before, meter),
        profiler=Profiler(workdir, profiled, start_step, meter.paused),
        lock=lock,
        mirror=mirror,
    )
    with closing(stream):
        step, stop_signal = _loop(components, state, start_step)
    for note in (meter.advice(), stream.unreadable):
        if note:
            status(note)

    # --- Write the receipt and the report.
    _write_summary(workdir, config, builder, step, meter.cost(), evaluator.results)
    if mirror:
        mirror.push()
    if step < config.steps:
        status(f"stopped after step {step:,} and saved; rerun the same command to continue")
        raise SystemExit(128 + stop_signal)
    result(
        f"trained {config.steps:,} steps in {format_duration(meter.cost().seconds)}; the run is in {shown_workdir}"
    )
    if evaluator.results:
        result(evaluator.table())
    else:
        result(f"evaluate it with: lit-fast eval {shown_workdir} --zero-shot E --retrieval E")


def _meter(
    config: Config,
    inputs: Inputs,
    builder: StepBuilder,
    mesh: Mesh,
    start_step: int,
    cost_before: RunCost,
    started: float,
) -> ThroughputMeter:
    """Return the meter of the run, with the FLOPs of its step."""
    batch = config.stream.global_batch
    pairs = batch * config.stream.captions_per_image
    tokens = inputs.packing.mean_tokens if inputs.packing else None
    return ThroughputMeter(
        pairs,
        step_flops(builder.model, pairs, batch, config.loss.image_head, tokens, builder.image),
        mesh.size,
        start_step=start_step,
        cost_before=cost_before,
        started=started,
        images_per_step=batch,
        pixels=inputs.stream.batches.pixels,
    )


def _first_state(
    workdir: str,
    config: Config,
    inputs: Inputs,
    builder: StepBuilder,
    mesh: Mesh,
) -> tuple[State, dict[str, Any] | None]:
    """Prepare the evaluation and make the state before the first step.

    Returns:
      The state, and the record of what `text.init` gave; None: nothing.
    """
    mean, model, image = inputs.mean(config.loss.center), builder.model, builder.image
    if image and inputs.image:
        embedder = DatasetEmbedder(image, inputs.image.preprocess, mesh, config.image.workers)
        inputs.evaluator.embed_images_with(embedder)
        pretrained = inputs.image.params
        params = init_params(model, config, mean, image if pretrained is None else None)
        if pretrained is not None:
            params["img"] = pretrained | params.get("img", {})
    else:
        inputs.evaluator.load_images(mean)
        params = init_params(model, config, mean)
    params, text_init = load_initial_params(workdir, config, params)
    if text_init:
        status(f"text tower starting from {text_init['source']}: {text_init['taken']}")
    state = init_state(params, builder.optimizer, mesh, config.optimizer.average_decay > 0)
    count = sum(p.size for p in jax.tree.leaves(state.params["txt"]))
    towers = f"text tower: {count / 1e6:.1f} M parameters"
    if image:
        count = sum(p.size for p in jax.tree.leaves(image_tower_params(state.params)))
        start = inputs.tower_json["source"] if config.image.train == "unlocked" else "random weights"
        towers += f", image tower: {count / 1e6:.1f} M from {start}"
    status(f"{towers} on {mesh.size} x {jax.devices()[0].device_kind}")
    return state, text_init


class _Components(NamedTuple):
    """The parts that the training loop connects."""

    config: Config
    mesh: Mesh
    train_step: Callable[[State, dict[str, jax.Array], bool], tuple[State, Metrics]]
    batches: Iterator[Batch]
    evaluator: Evaluator
    embed_text: EmbedText
    checkpoints: Checkpoints
    meter: ThroughputMeter
    log: TrainingLog
    profiler: Profiler
    lock: Lock | None  # of the run directory; None in all processes but the first
    mirror: RunMirror | None  # writes the local run directory to the bucket, if it is a copy


def _loop(c: _Components, state: State, start_step: int) -> tuple[int, int]:
    """Run the steps after `start_step`.

    Returns:
      The last completed step, and the signal that stopped the loop; 0: none.
    """
    config, paused = c.config, c.meter.paused
    preemption = PreemptionSignal(c.mesh, lambda: c.mirror is not None and c.mirror.has_failed)
    pending_log: tuple[int, Metrics] | None = None
    previous: Metrics | None = None
    with paused:
        batch = _to_devices(next(c.batches), c.mesh)
    try:
        # ===============================================================================================
        # The order of these lines matters: the devices must never wait for the host, and a process killed
        # at any line must resume to the same result.
        # ===============================================================================================
        for step in range(start_step + 1, config.steps + 1):
            # Dispatch the step, and prepare the next batch while the devices compute. After `reuse_memory`, one CPU
            # has computed the step when the call returns. The first step also compiles what logged ones need.
            c.profiler.before_step(step, state)
            compiling = paused if step == start_step + 1 else nullcontext()
            evaluate = c.evaluator.should_run(step)
            log = evaluate or step in (1, config.steps) or step % config.log.every_steps == 0
            with compiling, jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = c.train_step(state, batch, log or step == start_step + 1)
            c.profiler.after_step(step, metrics)
            if step < config.steps:
                with c.meter.waiting:
                    host_batch = next(c.batches)
                batch = _to_devices(host_batch, c.mesh)

            # Two steps in flight keep the devices busy. More would hold a batch each, delay the reaction to a
            # signal, and count time in which the devices compute as waiting for data.
            jax.block_until_ready(previous)
            previous = metrics

            stop_signal = preemption.should_stop()  # read once: a later signal stops the next step
            save = stop_signal or step == config.steps or step % config.checkpoint.every_steps == 0

            # Metrics are read one step late, when they are ready, so that the devices never idle for them.
            finite = pending_log is None or c.log.log_step(*pending_log)
            pending_log = (step, metrics) if log else None

            if evaluate or save:
                if pending_log:
                    c.log.log_step(*pending_log)
                    pending_log = None
                with paused:
                    c.checkpoints.check_finite(state)
                    evaluation: dict[str, float] = {}
                    if evaluate:  # before saving: if we are killed in between, both are repeated
                        c.evaluator.run(
                            c.embed_text, evaluation_params(state.opt, state.params), state.average
                        )
                        evaluation = c.evaluator.metrics()
                        c.log.log_evaluation(step, evaluation)
                    if save:
                        if c.mirror:  # a state that cannot reach the bucket is kept in the local copy
                            c.mirror.check()
                        elif c.lock:
                            c.lock.check()
                        c.checkpoints.save(step, state, evaluation)
            elif not finite:
                c.checkpoints.check_finite(state)

            c.log.advance()
            if stop_signal:
                break
    finally:  # also after an error, finish what is being saved
        c.checkpoints.close()
        c.profiler.close()
        c.log.close()
    return step, stop_signal


class PreemptionSignal:
    """Records SIGTERM and Ctrl-C, so that the current step is completed and saved.

    A second signal ends the process at once.
    """

    def __init__(self, mesh: Mesh, has_failed: Callable[[], bool] = lambda: False) -> None:
        """Begin to record signals.

        Args:
          has_failed: whether the run cannot be written any more; then the training stops as after SIGTERM.
        """
        self._received, _ = record_signals()
        self._mesh, self._has_failed = mesh, has_failed
        self._max = jax.jit(jnp.max, out_shardings=replicated(mesh))
        self._pending: deque[jax.Array] = deque()

    def should_stop(self) -> int:
        """Return the signal, 0 for none; called once per step in every process.

        All processes must stop after the same step. With several processes the maximum over all of them is computed
        on the devices and read two steps later, when it is available without waiting.
        """
        signal = self._received[0] if self._received else 0
        if not signal and self._has_failed():
            signal = SIGTERM
        if jax.process_count() == 1:
            return signal
        received = np.full(jax.local_device_count(), signal, np.int32)
        self._pending.append(
            self._max(jax.make_array_from_process_local_data(batch_sharding(self._mesh), received))
        )
        return int(self._pending.popleft()) if len(self._pending) > 2 else 0


def _to_devices(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Shard a batch of this process over the devices."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def _create_workdir(workdir: str, config: Config, inputs: Inputs, text_init: dict[str, Any] | None) -> None:
    """Write the records of the run directory."""
    sync_global_devices("checked")  # no process writes before all have checked the directory
    if jax.process_index() == 0:
        write_workdir(workdir, config, inputs.tower_json, inputs.tokens, inputs.stream, text_init)
    sync_global_devices("written")


def _write_summary(
    workdir: str,
    config: Config,
    builder: StepBuilder,
    step: int,
    cost: RunCost,
    results: list[dict[str, Any]],
) -> None:
    """Write the receipt and the report."""
    if jax.process_index() == 0:
        write_receipt(workdir, config, builder.memory, builder.attention.record, step, cost, results)
        write_report(workdir)
