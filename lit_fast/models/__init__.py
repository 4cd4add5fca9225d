"""Flax modules and their architectures."""
