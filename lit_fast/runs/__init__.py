"""The run directory: its files, checkpoints and metrics. Training writes it, evaluation and inference read it."""
