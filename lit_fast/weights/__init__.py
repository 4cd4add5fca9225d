"""Read public weights as parameters under big_vision's names; one module per layout of files."""
