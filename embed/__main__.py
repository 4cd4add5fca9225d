"""`python -m embed ARGS` is `lit-fast embed ARGS`."""

import sys

from lit_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["embed", *sys.argv[1:]]))
