"""Weights of public vision transformers, in every naming, as parameters of `lit_fast.models.vit.ViT`."""

from __future__ import annotations
