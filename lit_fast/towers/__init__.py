"""Frozen vision towers. To add a family of models or a layout of files, see `lit_fast/towers/layouts.py`."""
