"""Batches of features and token ids: shuffling, captions, packing, corruption."""
