"""Where TensorStore finds the arrays of a local directory or a bucket."""

from __future__ import annotations

from typing import Any

import tensorstore as ts

from lit_fast.storage import buckets
from lit_fast.storage.files import local_path
from lit_fast.storage.paths import absolute, is_bucket


def array_location(location: str) -> dict[str, Any]:
    """Return the `kvstore` of an array's specification."""
    if is_bucket(location):
        return buckets.spec(location)
    return {"driver": "file", "path": f"{absolute(local_path(location))}/"}  # it accepts no path with ".."


def array_context() -> ts.Context:
    """Return the one context of all arrays: resources in separate contexts would be separate pools."""
    return buckets.context()
