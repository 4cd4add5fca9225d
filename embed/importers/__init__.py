"""Features that others have computed, made into a dataset."""

from __future__ import annotations
