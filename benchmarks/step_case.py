"""The cases of `benchmarks.step`: sizes, batch, initial weights, limits.

All rivals get the same batch and the same initial weights, so that their losses can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

VOCAB, FEATURES = 32_000, 768
PAD, END = 0, 1  # ids of no token
LEARNING_RATE, BETAS, EPSILON, DECAY, CLIP = 1e-4, (0.9, 0.999), 1e-8, 1e-4, 1.0
TEMPERATURE, BIAS = 10.0, -10.0
REPEATS = 7
ENOUGH = 10.0  # seconds; a longer step is timed once
SMALL = 2**15  # tokens of a batch; on a CPU the steps of cases with at most as many alternate
AT_ONCE = 8  # cases whose steps alternate, as all of them hold their memory
SECONDS = 30.0  # a longer step is not run
MEMORY = 16 * 2**30  # bytes that a case may allocate on a CPU

Weights = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A rival, its tower, batch and form."""

    rival: str  # "ours", "big_vision", "open_clip" or "torch loop"
    dtype: str = "bfloat16"  # of the matrix products; parameters are float32
    form: str = ""  # big_vision: "scan"; PyTorch: "compile", "math attention" or both, with a comma
    width: int = 384
    depth: int = 6
    heads: int = 6
    length: int = 16
    masked: bool = False  # mask padding; otherwise attend to it and pool the last position
    pack: int = 1  # ours: `text.pack`
    batch: int = 512
    devices: int = 1
    compile_only: bool = False  # report the compiler's memory; run nothing

    @property
    def name(self) -> str:
        form = f"pack {self.pack}" if self.pack > 1 else self.form
        return f"{self.rival}, {form}" if form else self.rival

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Rival:
    """A step on data that are on the device."""

    step: Callable[[], float]  # returns the loss before the update, after all work is done
    parameters: int
    peak_memory: Callable[[], int] | None = None  # bytes on an accelerator; None: use the process's memory
    note: str = ""


def make_batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return features float32 [batch, 768] and padded ids int32 [batch, length].

    With these caption lengths, 22 % of 16 tokens and 74 % of 64 are padding, as in web alt-texts.
    """
    rng = np.random.default_rng(1)
    features = rng.standard_normal((case.batch, FEATURES), np.float32)
    ids = rng.integers(END + 1, VOCAB, (case.batch, case.length), np.int32)
    words = np.rint(14 * np.exp(0.6 * rng.standard_normal(case.batch))).clip(2, case.length).astype(int)
    ids[np.arange(case.batch), words - 1] = END
    ids[np.arange(case.length) >= words[:, None]] = PAD
    return features, ids


def make_weights(case: Case) -> Weights:
    """Return initial float32 weights of the text tower with big_vision's names and stacked layers."""
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
