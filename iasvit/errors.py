"""The one exception that a user may see: a clear sentence, exit status 2, no traceback."""

from __future__ import annotations


class IasvitError(ValueError):
    """Bad input. The message is one sentence that names the file, option or module at fault and what would be right.

    The command line prints it on standard error and exits with status 2; library callers catch it as a ValueError.
    """
