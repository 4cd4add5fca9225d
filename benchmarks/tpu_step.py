"""The one-day step on slices of TPU v4, v5e, v6e and v5p, by their compiler; no TPU is needed.

    pip install libtpu; python -m benchmarks.tpu_step [--topologies v4:2x2x1 v6e:2x2] [--attention xla pallas] [--lengths]

Each line is one compiled program of one device. Seconds are the compiler's estimate of cycles at the clock of the chip,
and beside them the attention kernels, which it gives no estimate for, from their own schedules. Transfers between chips
and instructions without an estimate (gather, scatter, sort) are not counted. Nothing was run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU is absent

import jax
import jax.numpy as jnp

from benchmarks.machine import describe
from lit_fast.config import Config
from lit_fast.config_io import load_config
from lit_fast.models.text_tower import TextTower
from lit_fast.train.cost.aot import compile_step, tpu_mesh
from lit_fast.train.cost.flops import step_flops
from lit_fast.train.cost.hardware import TPUS
from lit_fast.train.cost.hlo import parse_executions, program_cost
from lit_fast.train.cost.kernels import attention_cycles
from lit_fast.train.step import abstract_training

CONFIG = Path(__file__).parents[1] / "configs" / "siglit_b8_one_day.toml"
SLICES = ("v4:2x2x1", "v5e:2x2", "v6e:2x2", "v5p:2x2x1")
VOCAB, LENGTH, WIDTH = 32_000, 16, 768
ROW_TOKENS, MEAN_TOKENS = 104, 12.5  # of 8 captions at 22 % padding
GIB = 2**30
