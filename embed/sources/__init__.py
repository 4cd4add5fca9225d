"""The formats that `lit-fast index` reads: one module each, all yielding the same items."""

from __future__ import annotations
