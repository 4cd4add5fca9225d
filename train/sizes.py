"""Sizes that depend on the platform alone: tokens of a microbatch and `loss.tile`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from lit_fast.config import Config


class Sizes(NamedTuple):
    """What `text.keep = "auto"` and `loss.tile = 0` stand for."""

    most_tokens: dict[str, int]  # of a microbatch by text.dtype; fewer only where memory requires it
    least_tokens: int  # of a microbatch of a remat policy, before one that computes more again is tried
    tile: int


# TPU: estimates of the compiler for v4, of the one-day recipe with 131,072 tokens a device: 4 microbatches 0.618 s for
#      the layers, 16 take 0.650 and 2 take 0.629; the loss takes 15.7 ms with tiles of 2048 and 24.0 with 512.
# GPU: kernels a step, each with its time to start: the compiled step for H200 runs in proportion to the number of
#      microbatches and tiles. Memory is the only limit.
# CPU: measured on an AMD EPYC with AVX-512 and without AMX: what a core's caches hold.
SIZES = {
    "tpu": Sizes({"float32": 32_768, "bfloat16": 32_768}, 32_768, 2048),
    "gpu": Sizes({"float32": 2**20, "bfloat16": 2**20}, 8192, 4096),
    "cpu": Sizes({"float32": 768, "bfloat16": 2048}, 2**20, 512),
}


def with_tile(config: Config, platform: str) -> Config:
    """Return the configuration with the number that `loss.tile = 0` stands for on a platform."""
    if config.loss.tile:
        return config
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, tile=SIZES[platform].tile))
