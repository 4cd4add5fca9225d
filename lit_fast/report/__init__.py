"""HTML pages and the charts and galleries on them."""
