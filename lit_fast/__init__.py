"""SigLiT: train a text tower against the precomputed features of a frozen vision tower."""

__version__ = "0.1.0"
