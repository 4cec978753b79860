"""The one error that users see as a line of text instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong. The message names the file, the line and the remedy; exit code 2."""
