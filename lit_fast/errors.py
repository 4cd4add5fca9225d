"""The one exception that is shown to a user as a single line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: the message names the thing and the remedy, in one line.

    The command line prints it on stderr and exits with status 2.
    """
