"""Stage 1: from image files to a dataset and to the features of a frozen vision tower."""

from __future__ import annotations
