"""Suggest the name that a misspelled one may have meant."""

import difflib
from collections.abc import Iterable


def closest(name: str, candidates: Iterable[str]) -> str:
    """Return the end of a sentence on an unknown name: "; did you mean 'x'?" if there is a similar name, else "."."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else "."
