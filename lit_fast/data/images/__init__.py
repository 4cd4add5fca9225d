"""Images of a dataset: the bytes of one row, decoded to RGB."""
