"""Errors that a user can cause: one line that names the setting, what was given and what is accepted."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a setting, a file or the environment; the command line prints it in one line and exits with 2."""


class RunFailure(RuntimeError):
    """A run that cannot go on (divergence, collapsed loss scale); one line, exit code 1."""
