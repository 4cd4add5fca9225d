"""The training step beside its rivals: pairs a second and peak memory, on the same weights, batches and optimizer.

    python -m benchmarks.step [--quick | --rows essential]

Ours is the step of `lit-fast train`. big_vision's formulation (one batch x batch matrix, every layer stores everything)
is reimplemented in Flax, open_clip's text tower and loss are its own, on features, and the torch loop is
`torch.nn.TransformerEncoder`. All use Adam with clipping. Each case runs in a process of its own; memory is that of
the process with its libraries, or on a GPU what was allocated there. Steps are timed one by one, after one that is
not counted; on a CPU up to eight programs take turns, one step each, but for large batches, as the speed of a machine
varies with time. All start from the same weights; the exit status is 1 if losses or parameters differ.

On a GPU the tower is that of the one-day recipe and the batches grow further. Needs torch and open_clip_torch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, run_in_turns
from benchmarks.step_case import AT_ONCE, MEMORY, REPEATS, SECONDS, SMALL, Case
from lit_fast.models.precision import fast_dtype

GIB = 2**30
ONE_DAY: dict[str, Any] = {"width": 1024, "depth": 12, "heads": 16}  # configs/siglit_b8_one_day.toml
COMPILED = [512, 8192, 65_536, 1_048_576]  # batches that are only compiled, for their memory
BOTH = "compile, math attention"
TIMEOUT = 600

Result = dict[str, Any]
Found = list[tuple[Case, Result]]

HEADER = """
| step | products | batch | pairs/s | s a step, median of {repeats} | lowest - highest | peak, GiB | losses 1, 2 | |
|---|---|---|---|---|---|---|---|---|"""


def platform() -> str:
    """Return JAX's platform, from another process: this one must not allocate a GPU."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()[-1]


def forms(cpu: bool, quick: bool) -> list[Case]:
    """Return every rival in every form that may be its fastest."""
    dtype = fast_dtype("cpu" if cpu else "gpu")
    cases = [Case("ours", dtype), Case("big_vision", "float32"), Case("open_clip"), Case("torch loop")]
    if quick:
        return cases
    cases += [
        Case("ours", dtype, pack=8),
        Case("ours", "bfloat16" if dtype == "float32" else "float32"),
        Case("big_vision"),
        Case("big_vision", form="scan"),
    ]
    for rival in ("open_clip", "torch loop"):
        cases += [Case(rival, "float32"), Case(rival, form="compile")]
        if cpu:
            cases += [Case(rival, form="math attention"), Case(rival, "float32", form="math attention")]
            cases += [Case(rival, form=BOTH)]
    return sorted(cases, key=lambda case: [c.rival for c in cases].index(case.rival))


def run_cases(cases: Sequence[Case], cpu: bool) -> Iterator[tuple[Case, Result]]:
    """Run cases, each in a process of its own; on a CPU small ones in turns, AT_ONCE at a time."""
    environment = {"JAX_PLATFORMS": "cpu"} if cpu else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    small = cpu and all(case.batch * case.length <= SMALL and not case.compile_only for case in cases)
    size = AT_ONCE if small else 1
    for group in (cases[i : i + size] for i in range(0, len(cases), size)):
        results = run_in_turns(
            "benchmarks.step_worker",
            [case.as_dict() for case in group],
            timeout=TIMEOUT,
            environments=[environment | _devices(case) for case in group],
        )
        yield from zip(group, results, strict=True)


def _devices(case: Case) -> dict[str, str]:
    flag = f"--xla_force_host_platform_device_count={case.devices}"
    return {"XLA_FLAGS": flag} if case.devices > 1 else {}


def show(case: Case, result: Result) -> None:
    label = case.name if case.devices == 1 else f"{case.name}, {case.devices} devices"
    start = f"| {label} | {case.dtype} | {case.batch:,} |"
    if "failed" in result:
        print(f"{start} {result['failed']} | | | | | |", flush=True)
        return
    once = "; one step" if result["repeats"] == 1 else ""
    print(
        f"{start} {case.batch / result['median']:,.0f} | {result['median']:.3f} "
        f"| {result['lowest']:.3f} - {result['highest']:.3f} | {result['memory'] / GIB:.2f} "
        f"| {', '.join(f'{loss:.4f}' for loss in result['losses'])} | {result['note']}{once} |",
        flush=True,
    )


def table(title: str, cases: Sequence[Case], cpu: bool) -> Found:
    print(f"\n{title}\n{HEADER.format(repeats=REPEATS)}", flush=True)
    found = []
    for case, result in run_cases(cases, cpu):
        show(case, result)
        found.append((case, result))
    return found


def fastest(found: Found) -> list[Case]:
    """Return the fastest form of each rival."""
    best: dict[str, tuple[float, Case]] = {}
    for case, result in found:
        if "median" in result and result["median"] < best.get(case.rival, (float("inf"), case))[0]:
            best[case.rival] = result["median"], case
    return [case for _, case in best.values()]


def series(starts: list[Case], batches: list[int], cpu: bool) -> Found:
    """Run the cases over the batches, each until it takes too long or too much memory."""
    print(f"\nOver the batch, each in its fastest form\n{HEADER.format(repeats=REPEATS)}", flush=True)
    found: Found = []
    previous: dict[str, tuple[Case, Result]] = {}
    for batch in batches:
        cases = [replace(start, batch=batch) for start in starts]
        results = {
            case: too_large(case, *previous[case.rival], cpu) for case in cases if case.rival in previous
        }
        run = [case for case in cases if not results.get(case)]
        results |= dict(run_cases(run, cpu))
        previous = {case.rival: (case, results[case]) for case in run if "failed" not in results[case]}
        starts = [start for start in starts if start.rival in previous]
        for case, result in results.items():
            show(case, result)
            found.append((case, result))
    return found


def too_large(case: Case, smaller: Case, result: Result, cpu: bool) -> Result | None:
    """Return a failure if a batch would exceed the limits: time and memory grow at least with the batch."""
    growth = case.batch / smaller.batch
    seconds = growth * result["median"]
    if seconds > SECONDS:
        return {"failed": f"not run: about {seconds:.0f} s a step"}
    memory = growth * max(0, result["memory"] - GIB)
    if cpu and memory > MEMORY:
        return {"failed": f"not run: about {memory / GIB:.0f} GiB"}
    return None


def by_compiler(batches: list[int], cpu: bool) -> list[tuple[Case, Result]]:
    print("\nMemory by XLA, arguments and temporaries, ours fitted to 32 GiB; nothing is run\n")
    print("| step | products | batch | GiB | |\n|---|---|---|---|---|")
    found = []
    for rival in (Case("ours"), Case("big_vision"), Case("big_vision", form="scan")):
        for batch in batches:
            case = replace(rival, batch=batch, compile_only=True)
            ((_, result),) = run_cases([case], cpu)
            shown = result.get("failed") or f"{result['memory'] / GIB:,.2f}"
            print(
                f"| {case.name} | {case.dtype} | {batch:,} | {shown} | {result.get('note', '')} |", flush=True
            )
            found.append((case, result))
    return found


def differing(found: Found) -> list[str]:
    """Return the cases whose parameters or losses differ from the first case with the same inputs."""
    wrong: list[str] = []
    first: dict[tuple, tuple[list[float], int]] = {}
    for case, result in found:
        if "losses" not in result:
            continue
        key = (case.width, case.length, case.masked, case.batch)
        losses, parameters = first.setdefault(key, (result["losses"], result["parameters"]))
        # In bfloat16 a cosine is wrong by up to 4e-3, hence a logit at temperature 10 by 4e-2, of about 10.
        for a, b in zip(losses, result["losses"], strict=False):
            if abs(a - b) > 4e-3 * abs(a):
                wrong.append(f"{case.name} {case.dtype} at batch {case.batch}: loss {b:.4f}, not {a:.4f}")
        if abs(result["parameters"] / parameters - 1) > 0.01:
            wrong.append(f"{case.name}: {result['parameters']:,} parameters, not {parameters:,}")
    return wrong


def masked(starts: list[Case], length: int) -> list[Case]:
    """Return the cases with padding masked; ours also packed by true lengths. big_vision cannot mask padding."""
    return [
        replace(start, masked=True, length=length, pack=pack)
        for start in starts
        if start.rival != "big_vision"
        for pack in ((1, 4, 8) if start.rival == "ours" else (1,))
    ]


def essential() -> None:
    """Run ours and the rivals in the forms that were fastest on CPUs, and compile other batches for their memory.

    The two dtypes of ours at 512 pairs are for `lit_fast.models.precision`.
    """
    dtype = fast_dtype("cpu")
    print(describe("jax", "flax", "optax", "torch", "open_clip_torch") + f", {dtype} by its flags")
    cases = [Case("ours", dtype), Case("ours", "bfloat16" if dtype == "float32" else "float32")]
    for rival in ("open_clip", "torch loop"):
        cases += [Case(rival, form="math attention"), Case(rival, form=BOTH), Case(rival, "float32")]
    found = table("Width 384, 6 layers, 16 tokens, 512 pairs", cases, cpu=True)
    best = fastest(found)
    for batch in (128, 2048, 8192):
        over = [replace(start, batch=batch) for start in best]
        found += table(f"{batch:,} pairs, each in its fastest form", over, cpu=True)
    found += table("16 tokens, padding masked", masked(best, 16), cpu=True)
    found += table("64 tokens, padding masked", masked(best, 64), cpu=True)
    large = [replace(start, batch=32, **ONE_DAY) for start in best]
    found += table("The one-day tower: width 1024, 12 layers, 16 tokens", large, cpu=True)
    by_compiler(COMPILED, cpu=True)
    if wrong := differing(found):
        sys.exit("different work: " + "; ".join(wrong))


def plot(found: Found, compiled: Found, out: Path) -> None:
    """Plot pairs per second and memory over the batch."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3.4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for rival in dict.fromkeys(case.rival for case, _ in found):
        points = [(c, r) for c, r in found if c.rival == rival and "median" in r]
        label = f"{points[0][0].name}, {points[0][0].dtype}" if points else rival
        batches = [c.batch for c, _ in points]
        speed.plot(batches, [c.batch / r["median"] for c, r in points], "o-", label=label)
        (line,) = memory.plot(batches, [r["memory"] / GIB for _, r in points], "o-", label=label)
        predicted = [
            (c.batch, r["memory"] / GIB)
            for c, r in compiled
            if c.rival == rival and c.form != "scan" and "memory" in r
        ]
        if predicted:
            memory.plot(*zip(*predicted, strict=True), "x:", color=line.get_color(), label=f"{rival}, by XLA")
    for axes, name in ((speed, "pairs a second"), (memory, "peak memory, GiB")):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="batch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    speed.set_ylim(bottom=0)
    memory.set_yscale("log")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one form of each and two small batches")
    rows = "essential: on CPUs, ours and the fastest rivals over the batch and with the wide tower"
    parser.add_argument("--rows", choices=("all", "essential"), default="all", help=rows)
    args = parser.parse_args()
    if args.rows == "essential":
        essential()
        return
    cpu = platform() == "cpu"
    print(describe("jax", "flax", "optax", "torch", "open_clip_torch"))
    size: dict[str, Any] = {} if cpu else ONE_DAY
    batch = (128 if args.quick else 512) if cpu else 4096
    cases = [replace(case, batch=batch, **size) for case in forms(cpu, args.quick)]
    width, depth = cases[0].width, cases[0].depth
    found = table(f"Width {width}, {depth} layers, 16 tokens, padding attended to", cases, cpu)
    best = fastest(found)
    batches = (
        [64, 128] if args.quick else [128, 512, 2048, 8192] if cpu else [1024, 4096, 8192, 32_768, 131_072]
    )
    over = series(best, batches, cpu)
    compiled: Found = []
    if not args.quick:
        found += table("16 tokens, padding masked", masked(best, 16), cpu)
        longer = [replace(case, batch=batch if cpu else batch // 4) for case in masked(best, 64)]
        found += table("64 tokens, padding masked", longer, cpu)
    if cpu and not args.quick:
        large = [replace(case, batch=32, **ONE_DAY) for case in best]
        found += table("The one-day tower: width 1024, 12 layers, 16 tokens", large, cpu)
        ours = next(case for case in best if case.rival == "ours")
        devices = [replace(ours, devices=n) for n in (2, 4)]
        found += table("On several simulated devices of the same cores", devices, cpu)
        compiled = by_compiler(COMPILED, cpu)
    if not args.quick:
        plot(over, compiled, Path(__file__).with_name("step.svg"))
    if wrong := differing(found + over):
        sys.exit("different work: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
