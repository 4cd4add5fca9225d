"""Stage 1: from images to a dataset and the features of a frozen vision tower."""

from __future__ import annotations
