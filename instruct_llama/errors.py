"""The error that a user can fix."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix: one sentence that names the file, line or option, and the cure."""


def check(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
