"""The command `lit-fast`: argument parsing and printing."""
