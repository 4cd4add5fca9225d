"""The losses over all pairs of a batch, worked through tile by tile on a ring of devices."""

from __future__ import annotations
