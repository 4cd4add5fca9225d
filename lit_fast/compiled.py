"""Compiled programs are kept on the disk, so that a job that goes on does not compile again."""

from __future__ import annotations

import jax

from lit_fast.hub import cache_directory


def keep_compiled() -> None:
    """Turn on JAX's persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR names another place."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
