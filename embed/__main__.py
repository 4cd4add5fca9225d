"""`python -m embed ARGS` is `lit-fast embed ARGS`."""

from __future__ import annotations

import sys

from lit_fast.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["embed", *sys.argv[1:]]))
