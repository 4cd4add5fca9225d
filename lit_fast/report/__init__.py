"""HTML pages with charts and galleries, and what `lit-fast info` and `compare` print."""
