"""Time and memory of loss and gradients by batch size: ours, one JAX matrix of all pairs, open_clip and Inf-CLIP.

    python -m benchmarks.loss [--batches 512 2048 ...] [--repeats 5] [--open-clip-loss FILE]

Gradients are by texts, temperature and bias (Inf-CLIP: texts and temperature), as training with a frozen image tower
needs them. Images and texts are float32, width 768. "No labels" sums softplus over all pairs minus the logits of the
positive ones, which needs no matrix of labels. Each case runs in its own process. Memory is the peak beyond the inputs:
of the process, or on a GPU of the allocator. JAX programs also report the temporaries that the compiler reserves; for
the largest batches this is all that is measured. A call of more than ten seconds is not repeated.

`chunk_size` of open_clip is newer than release 3.3; FILE is a newer src/open_clip/loss.py, without which that form is
left out. Inf-CLIP needs CUDA and has a softmax loss only. Losses and gradients are compared with ours; the exit status
is 1 if they differ, or if a form other than Inf-CLIP fails at every batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import Cost, describe, measure, run_alone
from tests.torch_packages import load_torchvision

WIDTH, CHUNK, TEMPERATURE, BIAS = 768, 512, 10.0, -10.0
OURS, MATRIX, FEWER = "ours", "one matrix, JAX", "one matrix, JAX, no labels"
OPEN_CLIP, CHUNKED = "open_clip", f"open_clip, chunks of {CHUNK}"
SOFTMAX, INF_CLIP = "ours, softmax", "Inf-CLIP, softmax"
DEVICES, DEVICES_BATCH = (1, 2, 4), 8192
COMPILED = (65_536, 262_144, 1_048_576)
ENOUGH, MOST_SECONDS, MOST_MEMORY = 10.0, 60.0, 16 * 2**30
TOLERANCE = 1e-4  # float32 sums in another order differ by some 1e-6 of the largest
MIB = 2**20

Result = dict[str, Any]


# --- one case, in a process of its own


def inputs(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images and texts float32 [batch, width], normalized, each text near its image."""
    rng = np.random.default_rng(0)

    def unit(x: np.ndarray) -> np.ndarray:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x

    images = unit(rng.standard_normal((batch, WIDTH), np.float32))
    return images, unit(images + 2 * unit(rng.standard_normal((batch, WIDTH), np.float32)))


def gradient_sample(loss: Any, texts: Any, *others: Any) -> Result:
    """Return the values to compare: the loss, the gradients by two texts and those by temperature and bias."""
    return {
        "loss": float(loss),
        "texts": np.asarray(texts[:2]).tolist(),
        "others": [float(o) for o in others],
    }


def jax_case(form: str, batch: int, devices: int, repeats: int) -> Result:
    """Measure our loss or that of one matrix; with `repeats` 0 only compile it."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from lit_fast.config import LossConfig
    from lit_fast.losses.accumulate import LossParams
    from lit_fast.losses.contrastive import contrastive_loss
    from lit_fast.losses.pairs import ImageSide, TextSide
    from lit_fast.runtime import (
        AXIS,
        REPLICATED,
        SHARDED,
        batch_sharding,
        make_mesh,
        replicated,
        shard_map,
    )

    mesh = make_mesh(jax.devices()[:devices])
    config = LossConfig(name="softmax" if form == SOFTMAX else "sigmoid")

    def ours(params: LossParams, images: jax.Array) -> jax.Array:
        rows = lax.axis_index(AXIS) * len(images) + jnp.arange(len(images))
        return contrastive_loss(config, devices, params, ImageSide(images, rows), TextSide(rows))[0]

    def matrix(params: LossParams, images: jax.Array) -> jax.Array:
        everything = lax.all_gather(images, AXIS, tiled=True) if devices > 1 else images
        texts, log_scale, bias = params.texts, params.log_scale, params.bias
        logits = jnp.exp(log_scale) * jnp.einsum("nd,md->nm", texts, everything, precision="high") + bias
        own = lax.axis_index(AXIS) * len(texts) + jnp.arange(len(texts))
        if form == FEWER:  # softplus(-x) is softplus(x) - x
            positive = jnp.take_along_axis(logits, own[:, None], axis=1)
            return (jnp.sum(jax.nn.softplus(logits)) - jnp.sum(positive)) / batch
        label = jnp.where(own[:, None] == jnp.arange(batch), 1.0, -1.0)
        return -jnp.sum(jax.nn.log_sigmoid(label * logits)) / batch

    def compute(params: LossParams, images: jax.Array) -> tuple[jax.Array, LossParams]:
        loss, gradients = jax.value_and_grad(ours if form in (OURS, SOFTMAX) else matrix)(params, images)
        texts, *others = gradients
        return lax.psum(loss, AXIS), LossParams(texts, *lax.psum(others, AXIS))

    bias = None if form == SOFTMAX else np.float32(BIAS)
    specs = LossParams(SHARDED, REPLICATED, REPLICATED)
    mapped = shard_map(compute, mesh, (specs, SHARDED), (REPLICATED, specs))
    rows = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32, sharding=batch_sharding(mesh))
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    compiled = jax.jit(mapped).lower(LossParams(rows, one, None if bias is None else one), rows).compile()
    result: Result = {"temporaries": compiled.memory_analysis().temp_size_in_bytes}  # type: ignore[union-attr]
    if not repeats:
        return result
    images, texts = (jax.device_put(a, batch_sharding(mesh)) for a in inputs(batch))
    scalars = jax.device_put((np.float32(math.log(TEMPERATURE)), bias), replicated(mesh))
    arguments = LossParams(texts, *scalars), images
    before = jax.devices()[0].memory_stats()
    cost = measure(lambda: jax.block_until_ready(compiled(*arguments)), repeats, enough=ENOUGH)
    # A single call may reuse memory that compiling freed, so that the process grows by less than the temporaries.
    result |= cost._replace(memory=max(cost.memory, result["temporaries"]))._asdict()
    if before and (after := jax.devices()[0].memory_stats()):
        result["memory"] = after["peak_bytes_in_use"] - before["bytes_in_use"]
    loss, (grads, *others) = compiled(*arguments)
    return result | gradient_sample(loss, grads, *(o for o in others if o is not None))


def torch_case(form: str, batch: int, repeats: int, open_clip_loss: str | None) -> Result:
    """Measure open_clip's or Inf-CLIP's loss, on a GPU if there is one."""
    import torch

    load_torchvision()  # before open_clip, which imports it
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, texts = (torch.from_numpy(a).to(device) for a in inputs(batch))
    log_scale, bias = (torch.tensor(v, device=device) for v in (math.log(TEMPERATURE), BIAS))
    wanted = [
        a.requires_grad_() for a in ((texts, log_scale) if form == INF_CLIP else (texts, log_scale, bias))
    ]

    def sigmoid() -> torch.Tensor:
        return criterion(images, texts, log_scale.exp(), bias)

    def softmax() -> torch.Tensor:
        scale = log_scale.exp()
        both = cal_inf_loss(images, texts, scale=scale) + cal_inf_loss(texts, images, scale=scale)
        return both / 2

    if form == INF_CLIP:
        from inf_cl import cal_inf_loss

        loss = softmax
    else:
        criterion = siglip_loss(open_clip_loss)(**({"chunk_size": CHUNK} if form == CHUNKED else {}))
        loss = sigmoid

    def compute() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        value = loss()
        gradients = torch.autograd.grad(value, wanted)
        if device == "cuda":
            torch.cuda.synchronize()
        return value.detach(), gradients

    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    result: Result = measure(compute, repeats, enough=ENOUGH)._asdict()
    if device == "cuda":
        result["memory"] = torch.cuda.max_memory_allocated() - held
    value, (grads, *others) = compute()
    return result | gradient_sample(value.cpu(), grads.cpu(), *others)


def siglip_loss(file: str | None) -> Callable[..., Any]:
    """Return open_clip's loss class, from `file` if given."""
    if not file:
        from open_clip.loss import SigLipLoss

        return SigLipLoss  # type: ignore[no-any-return]
    spec = importlib.util.spec_from_file_location("newer_open_clip_loss", file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SigLipLoss  # type: ignore[no-any-return]


def run_case(case: dict[str, Any]) -> Result:
    form, batch, repeats = case["form"], case["batch"], case["repeats"]
    if form in (OURS, MATRIX, FEWER, SOFTMAX):
        return jax_case(form, batch, case["devices"], repeats)
    return torch_case(form, batch, repeats, case["open_clip_loss"])


# --- all of them


def start(form: str, batch: int, repeats: int, devices: int = 1, open_clip_loss: str | None = None) -> Result:
    case = {
        "form": form,
        "batch": batch,
        "repeats": repeats,
        "devices": devices,
        "open_clip_loss": open_clip_loss,
    }
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} if devices > 1 else {}
    return run_alone("benchmarks.loss", case, environment=flags)


def too_much(last: tuple[int, Result] | None, batch: int) -> str | None:
    """Return why a batch is skipped, extrapolated from the last one; None to run it."""
    if last is None:
        return None
    smaller, result = last
    if "failed" in result:
        return result["failed"]
    pairs = (batch / smaller) ** 2
    seconds = result["median"] * pairs
    # Of a form without a matrix of all pairs the memory grows with the batch.
    memory = result["memory"] * (batch / smaller if result["linear"] else pairs)
    if memory > MOST_MEMORY:
        return f"would need {memory / 2**30:.0f} GiB"
    return f"would take {seconds:.0f} s" if seconds > MOST_SECONDS else None


def difference(result: Result, ours: Result) -> float:
    """Return the largest relative difference of loss and gradients."""
    worst = 0.0
    for name in ("loss", "texts", "others"):
        a, b = np.asarray(result[name], np.float64), np.asarray(ours[name], np.float64)
        # Temperature and bias are compared one by one, the elements of a text's gradient with the largest.
        size = np.abs(b).max() if name == "texts" else np.abs(b)
        worst = max(worst, float((np.abs(a - b) / size).max()))
    return worst


def row(batch: int, form: str, result: Result, ours: Result | None) -> str:
    if "failed" in result:
        return f"| {batch:,} | {form} | not run: {result['failed']} | | | | | |"
    cost = Cost(*(result[f] for f in Cost._fields))
    temporaries = f"{result['temporaries'] / MIB:,.1f}" if "temporaries" in result else ""
    apart = f"{difference(result, ours):.0e}" if ours and ours is not result else ""
    return (
        f"| {batch:,} | {form} | {1e3 * cost.median:,.1f} | {1e3 * cost.lowest:,.1f} - {1e3 * cost.highest:,.1f} "
        f"| {cost.repeats} | {cost.memory / MIB:,.1f} | {temporaries} | {apart} |"
    )


def over_batches(
    forms: list[str], batches: list[int], repeats: int, file: str | None
) -> dict[str, dict[int, Result]]:
    """Measure every form at every batch and print the table; the first form is ours."""
    print(
        "\n| batch | form | ms, median | lowest - highest | calls | memory, MiB | the compiler's, MiB "
        "| differs from ours by |\n|---|---|---|---|---|---|---|---|"
    )
    found: dict[str, dict[int, Result]] = {form: {} for form in forms}
    last: dict[str, tuple[int, Result]] = {}
    for batch in batches:
        for form in forms:
            reason = too_much(last.get(form), batch)
            result = {"failed": reason} if reason else start(form, batch, repeats, open_clip_loss=file)
            result["linear"] = form in (OURS, SOFTMAX, INF_CLIP)
            last[form] = (batch, result)
            ours = found[forms[0]].get(batch)
            if "failed" not in result:
                found[form][batch] = result
            print(row(batch, form, result, ours), flush=True)
    return found


def over_devices(repeats: int) -> None:
    print(f"\nBatch {DEVICES_BATCH:,} on devices of the same processor:\n")
    print(
        "| devices | form | ms, median | lowest - highest | the compiler's MiB a device |\n|---|---|---|---|---|"
    )
    for devices in DEVICES:
        for form in (OURS, MATRIX):
            result = start(form, DEVICES_BATCH, repeats, devices)
            if "failed" in result:
                print(f"| {devices} | {form} | not run: {result['failed']} | | |")
                continue
            print(
                f"| {devices} | {form} | {1e3 * result['median']:,.0f} | {1e3 * result['lowest']:,.0f} - "
                f"{1e3 * result['highest']:,.0f} | {result['temporaries'] / MIB:,.1f} |",
                flush=True,
            )


def compiled_only() -> dict[str, dict[int, int]]:
    print("\nTemporaries a device, by the compiler alone, MiB:\n")
    cases = [(devices, form) for devices in (1, 4) for form in (OURS, MATRIX)]
    print(f"| batch | {' | '.join(f'{form}, devices: {devices}' for devices, form in cases)} |")
    print(f"|---|{'---|' * len(cases)}")
    found: dict[str, dict[int, int]] = {OURS: {}, MATRIX: {}}
    for batch in COMPILED:
        cells = []
        for devices, form in cases:
            result = start(form, batch, 0, devices)
            cells.append(result.get("failed") or f"{result['temporaries'] / MIB:,.0f}")
            if devices == 1 and "failed" not in result:
                found[form][batch] = result["temporaries"]
        print(f"| {batch:,} | {' | '.join(cells)} |", flush=True)
    return found


def plot(found: dict[str, dict[int, Result]], compiled: dict[str, dict[int, int]], out: Path) -> None:
    """Plot time and memory over the batch on logarithmic axes; memory by the compiler alone is dotted."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for form, results in found.items():
        for panel, name, unit in ((axes[0], "median", 1.0), (axes[1], "memory", 2**30)):
            points = [(batch, result[name] / unit) for batch, result in results.items() if result[name]]
            if points:
                (line,) = panel.plot(*zip(*points, strict=True), marker="o", label=form)
                more = [(b, size / 2**30) for b, size in compiled.get(form, {}).items()]
                if panel is axes[1] and more:
                    panel.plot(*zip(points[-1], *more, strict=True), ":o", color=line.get_color())
    for panel, label in zip(axes, ("seconds", "GiB"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set(xlabel="batch", ylabel=label)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[512, 2048, 4096, DEVICES_BATCH, 16_384, 32_768]
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--open-clip-loss", metavar="FILE")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(json.loads(args.case))))
        return
    print(describe("jax", "torch", "open_clip_torch"))
    sigmoid = [OURS, MATRIX, FEWER, OPEN_CLIP] + [CHUNKED] * bool(args.open_clip_loss)
    found = over_batches(sigmoid, args.batches, args.repeats, args.open_clip_loss)
    found |= over_batches([SOFTMAX, INF_CLIP], args.batches[:3], args.repeats, None)
    over_devices(args.repeats)
    plot(found, compiled_only(), Path(__file__).with_name("loss.svg"))
    wrong = [
        f"{form} at {batch:,}"
        for rivals in (sigmoid, [SOFTMAX, INF_CLIP])
        for form in rivals[1:]
        for batch, result in found[form].items()
        if batch in found[rivals[0]] and difference(result, found[rivals[0]][batch]) > TOLERANCE
    ]
    if wrong:
        sys.exit(f"not the same loss and gradients, to {TOLERANCE}: " + "; ".join(wrong))
    if missing := [form for form, results in found.items() if not results and form != INF_CLIP]:
        sys.exit(f"failed at every batch: {', '.join(missing)}")
    print(f"\nAll that ran gave our loss and gradients to {TOLERANCE} of their size.")


if __name__ == "__main__":
    main()
