"""Cost of a training step: FLOPs, memory, collectives, by tracing and by compiling."""
