"""Flax modules of the towers, their sizes and FLOP counts."""
