"""Check that all processes of a job run the same config and the same code."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

Exchange = Callable[[Any], list[Any]]  # this process's object -> the objects of all processes, in rank order
MAX_NAMED = 5


def require_same(facts: Mapping[str, str], exchange: Exchange) -> None:
    """Compare hashes of the facts; where they differ, exchange the facts and raise ValueError naming them."""
    if len(set(exchange(fingerprint(facts)))) == 1:
        return
    everyone: list[Mapping[str, str]] = exchange(dict(facts))
    keys = sorted({key for theirs in everyone for key in theirs})
    differing = [key for key in keys if len({theirs.get(key) for theirs in everyone}) > 1]
    sentences = [_difference(key, [theirs.get(key, "absent") for theirs in everyone]) for key in differing]
    more = f" and {len(sentences) - MAX_NAMED} more" if len(sentences) > MAX_NAMED else ""
    raise ValueError(
        f"The processes of this job differ: {'; '.join(sentences[:MAX_NAMED])}{more}; start all of them with the "
        "same settings and the same code."
    )


def fingerprint(facts: Mapping[str, str]) -> str:
    """Return the SHA-256 of the facts."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def _difference(key: str, values: list[str]) -> str:
    """Return a sentence with the value of rank 0 and the first value that differs, with its rank."""
    rank = next(rank for rank, value in enumerate(values) if value != values[0])
    return f"{key} is {values[0]} on process 0 and {values[rank]} on process {rank}"
