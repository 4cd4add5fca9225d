"""HTML pages with charts and galleries, and the text of `lit-fast info` and `compare`."""
