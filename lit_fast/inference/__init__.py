"""Use a trained model: load, classify, search."""
