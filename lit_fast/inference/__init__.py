"""A trained model in use: load, classify, search."""
