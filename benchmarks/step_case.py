"""One case of `benchmarks.step` in a process of its own: what it is, what it works on, and what it takes.

    python -m benchmarks.step_case --case '{"rival": "open_clip", "batch": 512, ...}'

All rivals get the same batch and the same initial weights, so that their losses can be compared.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

VOCAB, FEATURES = 32_000, 768
PAD, END = 0, 1  # ids that no word has
LEARNING_RATE, BETAS, EPSILON, DECAY, CLIP = 1e-4, (0.9, 0.999), 1e-8, 1e-4, 1.0
TEMPERATURE, BIAS = 10.0, -10.0
REPEATS = 5
ENOUGH = 4.0  # seconds; a step that takes longer is made once
SECONDS = 30.0  # one that would take longer is not tried
MEMORY = 16 * 2**30  # bytes that a case may allocate on a CPU

Weights = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A rival, what it is given and how it is run."""

    rival: str  # "ours", "big_vision", "open_clip" or "torch loop"
    dtype: str = "bfloat16"  # of the matrix products; parameters are float32
    form: str = ""  # of big_vision "scan"; of PyTorch "compile" or "math attention"
    width: int = 384
    depth: int = 6
    heads: int = 6
    length: int = 16
    masked: bool = False  # padding is hidden; if not, it is attended to and the last position is pooled
    pack: int = 1  # of ours: `text.pack`
    batch: int = 512
    devices: int = 1
    compile_only: bool = False  # ask the compiler for the memory and run nothing

    @property
    def name(self) -> str:
        form = f"pack {self.pack}" if self.pack > 1 else self.form
        return f"{self.rival}, {form}" if form else self.rival

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Rival:
    """A step that can be taken, on data that lie on the device."""

    step: Callable[[], float]  # the loss before the update; waits until all is done
    parameters: int
    peak_memory: Callable[[], int] | None = None  # bytes of an accelerator; None: the process's own count
    note: str = ""


def make_batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [batch, 768] and ids int32 [batch, length], padded.

    Of captions as long as these 22 % of 16 tokens and 74 % of 64 are padding, as of web alt-texts.
    """
    rng = np.random.default_rng(1)
    features = rng.standard_normal((case.batch, FEATURES), np.float32)
    ids = rng.integers(END + 1, VOCAB, (case.batch, case.length), np.int32)
    words = np.rint(14 * np.exp(0.6 * rng.standard_normal(case.batch))).clip(2, case.length).astype(int)
    ids[np.arange(case.batch), words - 1] = END
    ids[np.arange(case.length) >= words[:, None]] = PAD
    return features, ids


def make_weights(case: Case) -> Weights:
    """Initial weights of the text tower by big_vision's names, layers stacked; float32."""
    rng = np.random.default_rng(2)
    width, depth, heads, hidden = case.width, case.depth, case.heads, 4 * case.width

    def normal(*shape: int, fan_in: int) -> np.ndarray:
        values = rng.standard_normal(shape, np.float32)
        values *= fan_in**-0.5
        return values

    def dense(
        inputs: tuple[int, ...], outputs: tuple[int, ...], layers: tuple[int, ...] = (depth,)
    ) -> Weights:
        kernel = normal(*layers, *inputs, *outputs, fan_in=int(np.prod(inputs)))
        return {"kernel": kernel, "bias": np.zeros((*layers, *outputs), np.float32)}

    def norm(*shape: int) -> Weights:
        return {"scale": np.ones(shape, np.float32), "bias": np.zeros(shape, np.float32)}

    split = (heads, width // heads)
    attention = {name: dense((width,), split) for name in ("query", "key", "value")}
    block = {
        "LayerNorm_0": norm(depth, width),
        "MultiHeadDotProductAttention_0": attention | {"out": dense(split, (width,))},
        "LayerNorm_1": norm(depth, width),
        "MlpBlock_0": {"Dense_0": dense((width,), (hidden,)), "Dense_1": dense((hidden,), (width,))},
    }
    return {
        "Embed_0": {"embedding": normal(VOCAB, width, fan_in=width)},
        "pos_embedding": normal(1, case.length, width, fan_in=width),
        "Encoder_0": {"encoderblock": block, "encoder_norm": norm(width)},
        "head": dense((width,), (FEATURES,), ()),
    }


def run(case: Case) -> dict[str, Any]:
    """What one case takes, as `benchmarks.step` prints it."""
    from benchmarks.machine import measure, peak_memory

    # Only what the case needs, as libraries count as memory.
    if case.rival in ("ours", "big_vision"):
        from benchmarks import step_jax

        if case.compile_only:
            return step_jax.memory_by_compiler(case)
        build = step_jax.ours if case.rival == "ours" else step_jax.big_vision
    else:
        from benchmarks import step_torch

        build = step_torch.open_clip if case.rival == "open_clip" else step_torch.torch_loop
    try:
        rival = build(case)
        ctypes.CDLL(None).malloc_trim(0)  # the allocator may keep what compiling took; it is not the step's
        losses: list[float] = []
        cost = measure(lambda: losses.append(rival.step()), REPEATS, enough=ENOUGH)
    except (MemoryError, RuntimeError) as error:  # JAX's own errors are RuntimeErrors as well
        words = ("out of memory", "resource_exhausted", "can't allocate", "bad_alloc")
        if isinstance(error, MemoryError) or any(word in str(error).lower() for word in words):
            return {"failed": "out of memory"}
        raise
    return {
        "median": cost.median,
        "lowest": cost.lowest,
        "highest": cost.highest,
        "repeats": cost.repeats,
        "memory": (rival.peak_memory or peak_memory)(),
        "parameters": rival.parameters,
        "losses": losses[:2],
        "note": rival.note,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", required=True)
    case = Case(**json.loads(parser.parse_args().case))
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    print(json.dumps(run(case)))


if __name__ == "__main__":
    main()
