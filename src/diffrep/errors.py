"""The three ways a command can fail, and the words it fails with (exit codes: docs/architecture.md)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffrepError(Exception):
    """A failure with one clear line for the user instead of a traceback."""

    exit_code = 1


class UserError(DiffrepError, ValueError):
    """The input cannot be used: exit 2, before anything was written."""

    exit_code = 2


class RunError(DiffrepError, RuntimeError):
    """A run that began cannot go on (disk full, non-finite loss): exit 3."""

    exit_code = 3


class Interrupted(DiffrepError):  # noqa: N818 - it is no error of anyone
    """Stopped by Ctrl-C or SIGTERM after a checkpoint was written: exit 130."""

    exit_code = 130


def nearest(name: str, valid: Iterable[str], limit: int = 3) -> str:
    """A hint such as ``did you mean 'optim'?``, else the list of what is valid.

    Raises nothing; an empty ``valid`` gives ``nothing is valid here``.
    """
    names = sorted(map(str, valid))
    close = difflib.get_close_matches(str(name), names, n=limit, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not names:
        return "nothing is valid here"
    shown = ", ".join(names[:12])
    return f"valid: {shown}" + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
