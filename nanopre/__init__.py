"""nanopre: a minimal, plugin-based framework to pre-train language models."""

import pluggy

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("nanopre")
"""Marks a function or method as an implementation of a hook of `nanopre.hookspecs`."""


class UserError(Exception):
    """What the user can mend. Its text is the whole message: one sentence that names the file, key or flag,
    what is wrong and what would be right. The scripts print it without a traceback and exit with status 2."""
