"""Weights of public vision transformers, in every naming, as parameters of `lit_fast.vit.ViT`."""
