"""Name the objectives of a sweep's runs by what tells them apart."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from report.records import Record

UNKNOWN = "objective not recorded"  # in lines of earlier versions
_ARGUMENTS = re.compile(r"\([^)]*\)")  # of a part, such as "(gamma=5.0)"
_OF_THE_PAPER = {"name": "gaussian", "prediction": "noise", "weighting": "none"}


def objectives_of(records: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """Return the name of each run's objective, by the run.

    Where the sweep has one objective, lines of earlier versions, which do not say theirs, have the same.
    """
    facts = {run: _facts_of(of_run) for run, of_run in records.items()}
    known = [found for found in facts.values() if found is not None]
    names = names_of(known)
    others = UNKNOWN if len(names) != 1 else next(iter(names.values()))
    return {run: others if found is None else names[key_of(found)] for run, found in facts.items()}


def main_objective(records: Mapping[str, Sequence[Record]]) -> str:
    """Return the objective of most runs, with preference for the paper's among equals."""
    names = objectives_of(records)
    of_paper = {names[run] for run, of_run in records.items() if (_facts_of(of_run) or {}) == _OF_THE_PAPER}
    every = list(names.values())
    return max(every, key=lambda name: (every.count(name), name in of_paper))


def _facts_of(records: Sequence[Record]) -> dict[str, Any] | None:
    """Return a run's objective as its newest record with one says, or None."""
    return next((record["objective"] for record in reversed(records) if record.get("objective")), None)


def names_of(every: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return a short name of each of these settings, which have a ``name``, by `key_of`.

    It has the parts that differ among the settings with that name, such as "flow gvp uniform", and the arguments of
    these only where they alone differ.
    """
    kinds: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for facts in every:
        kinds[str(facts.get("name"))].append(facts)
    names: dict[str, str] = {}
    for kind, alike in kinds.items():
        keys = dict.fromkeys(key for facts in alike for key in facts)
        differing = [key for key in keys if len({json.dumps(facts.get(key)) for facts in alike}) > 1]
        full = {key_of(facts): _joined(kind, (_part(key, facts.get(key)) for key in differing)) for facts in alike}
        short = {key: _ARGUMENTS.sub("", name) for key, name in full.items()}
        names |= short if len(set(short.values())) == len(set(full.values())) else full
    return names


def _joined(kind: str, parts: Iterable[str]) -> str:
    return " ".join([kind, *(part for part in parts if part)])


def _part(key: str, value: Any) -> str:
    """Return one setting for a name, empty for one that does nothing."""
    if value in (None, "none"):
        return ""
    return value if isinstance(value, str) else f"{key}={json.dumps(value)}"


def key_of(facts: Mapping[str, Any]) -> str:
    """Return text that equal settings share."""
    return json.dumps(facts, sort_keys=True)
