"""Stage 2: train the text tower on stored features.

loop            train(), the stages of a training and its loop
inputs          features, tokens, stream and evaluation of a run; `input_pipeline` makes the batches
step            one training step; optimizer, cost (memory and FLOPs of the step), step_builder
workdir         the run directory; checkpoints, `tracking` (metrics, console, receipt, report)
plan            `lit-fast plan`
export          `lit-fast export`
"""

from __future__ import annotations
