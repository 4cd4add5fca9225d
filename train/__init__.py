"""Stage 2: train the text tower on stored features."""

from __future__ import annotations
