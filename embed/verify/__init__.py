"""`lit-fast verify`: check that a dataset, its features and its tokens are intact."""
