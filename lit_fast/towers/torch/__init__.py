"""Vision towers of timm, open_clip and transformers, computed by JAX through torchax (extra `torch`).

PyTorch builds the model and is traced once; one XLA program runs, as for lit_fast's own towers. `packages` imports the
libraries, `timm`, `open_clip` and `transformers` each build the models of one library, `load` chooses between them,
`trace` runs a module under JAX, and `catalogue` lists names.
"""
