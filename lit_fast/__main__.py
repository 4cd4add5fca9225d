"""`python -m lit_fast` is the command `lit-fast`."""

from lit_fast.cli import main

raise SystemExit(main())
