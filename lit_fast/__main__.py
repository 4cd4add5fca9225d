"""`python -m lit_fast` is the command `lit-fast`."""

from __future__ import annotations

from lit_fast.cli.main import main

raise SystemExit(main())
