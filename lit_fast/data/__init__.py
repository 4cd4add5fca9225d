"""Datasets on disk: rows, features, tokens, images."""
