"""Sort the evaluations of a sweep into curves. All points come from an ``evaluations.jsonl``."""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from report import paper
from report.fit import PowerLaw, fit_power_law
from report.models import Kind, kind_of
from report.objectives import main_objective, objectives_of
from report.records import DISTANCE, Record, num_calls, num_sampling_steps
from report.runs import read_runs
from report.seeds import by_model

# The facts that all points of one figure share; images without captions have no captions_hash.
PROTOCOL_KEYS = (
    "step",
    "weights",
    "sampler",
    "guidance",
    "num_images",
    "labels",
    "sampling_seed",
    "network_precision",
    "decoder",
    "reference_hash",
    "feature_extractor_hash",
    "captions_hash",
)
SHAPE = ("family", "size", "patch_size", "width", "depth", "block")  # of a network, where it has them
COLUMNS = (
    "run",
    *SHAPE,
    "gmacs",
    "parameters",
    "training_gmacs",
    "training_seed",
    "step",
    "images_seen",
    "frechet_distance",
    "recognized_fraction",
)


@dataclass(frozen=True)
class Measure:
    """A number of a record that a figure may show."""

    key: str
    name: str
    metric: str  # the metric whose settings must agree as well
    better: str  # "lower" or "higher"


# The metrics of the paper's figure 12, and those that small data sets have instead.
MEASURES = (
    Measure("sfid", "sFID", "sfid", "lower"),
    Measure("inception_score", "Inception Score", "inception_score", "higher"),
    Measure("precision", "Precision", "precision_recall", "higher"),
    Measure("recall", "Recall", "precision_recall", "higher"),
    Measure("kernel_distance", "Kernel distance", "kernel", "lower"),
    Measure("kid", "KID", "kid", "lower"),
    Measure("clip_score", "CLIP score", "clip_score", "higher"),
    Measure("recognized_fraction", "Fraction recognized as its class", "", "higher"),
)


@dataclass(frozen=True)
class Study:
    """The runs of a sweep and their evaluations."""

    sweep: Path  # the folder that holds the runs, or a file with all of their evaluations
    chosen: dict[str, Record]  # one record of each evaluated run, all with one protocol and step
    records: dict[str, list[Record]]  # all records of each evaluated run, in order
    unevaluated: list[str]

    @property
    def name(self) -> str:
        """Return the name of the sweep's folder or file, without the file's ending."""
        path = self.sweep.resolve()
        return path.name if self.has_folders else path.stem

    @property
    def has_folders(self) -> bool:
        """Return whether the runs have folders, with configs, samples and checkpoints, rather than one file."""
        return self.sweep.is_dir()

    @property
    def held_back(self) -> str | None:
        """Return a sentence with the runs that prevent a comparison at a later step, or None if there are none."""
        last = {name: curve[-1]["step"] for name, curve in self.over_training().items()}
        step, latest = self.protocol["step"], max(last.values())
        if latest == step:
            return None
        behind = ", ".join(name for name in last if last[name] == step)
        return (
            f"All are compared at step {step}, since {behind} has no later evaluation; others have some up to step "
            f"{latest}."
        )

    @property
    def rows(self) -> list[Record]:
        """Return the chosen records as table rows, by increasing gmacs."""
        every = self.chosen.values()
        more = [m.key for m in MEASURES if m.key not in COLUMNS and None not in [number_of(r, m.key) for r in every]]
        absent = [key for key in SHAPE if not any(key in record for record in every)]
        columns = [*COLUMNS[:-2], *(["fid"] if self.is_fid else []), *COLUMNS[-2:], *more]
        columns = [column for column in columns if column not in absent]
        if self.has_several_objectives:
            columns.insert(1, "objective")
        rows = [
            {column: {**record, "run": name, "objective": self.objectives[name]}.get(column) for column in columns}
            for name, record in self.chosen.items()
        ]
        return sorted(rows, key=lambda row: row["gmacs"])

    @property
    def protocol(self) -> Record:
        """Return a chosen record, of the paper's network if there is one, which has the protocol of all of them."""
        return max(self.chosen.values(), key=lambda record: record["family"] == paper.PAPERS_FAMILY)

    @cached_property
    def objectives(self) -> dict[str, str]:
        """Return the name of each run's objective."""
        return objectives_of(self.records)

    @property
    def has_several_objectives(self) -> bool:
        """Return whether runs differ in their objective. Then their samplers may differ too."""
        return len(set(self.objectives.values())) > 1

    @cached_property
    def main_objective(self) -> str:
        """Return the objective of the scaling figures: that of most runs, with preference for the paper's."""
        return main_objective(self.records)

    @property
    def is_fid(self) -> bool:
        """Return whether the distance is on features of the 2015 Inception network."""
        return all("fid" in record for record in self.chosen.values())

    @property
    def distance_name(self) -> str:
        """Return the distance's name, such as "FID-50K"."""
        return distance_name(self.protocol) if self.is_fid else f"Frechet distance on {self._extractor}"

    @property
    def _extractor(self) -> str:
        return str(self.protocol["feature_extractor"])

    @property
    def main_kind(self) -> Kind:
        """Return the kind of model of the scaling figures: that of most runs, with preference for the paper's.

        Runs of other objectives do not count.
        """
        return _most_frequent([kind_of(record) for name, record in self.chosen.items() if self.is_main(name)])

    def kinds(self) -> list[Kind]:
        """Return the kind of each family's curve: the main one first, then of each other family that of most runs."""
        main, by_family = self.main_kind, defaultdict(list)
        for record in self.chosen.values():
            by_family[record["family"]].append(kind_of(record))
        return [main, *(_most_frequent(kinds) for name, kinds in sorted(by_family.items()) if name != main.family)]

    def objective_of(self, kind: Kind) -> str:
        """Return the objective of the curve of a kind: the main one where the kind has it, else that of most runs."""
        found = [self.objectives[name] for name, record in self.chosen.items() if kind_of(record) == kind]
        return self.main_objective if self.main_objective in found else max(found, key=found.count)

    def is_main(self, name: str) -> bool:
        """Return whether a run has the main objective."""
        return self.objectives[name] == self.main_objective

    def scaling(self, kind: Kind | None = None) -> dict[str, Record]:
        """Return the chosen records of a kind, by default the main one, with its objective, by increasing gmacs."""
        kind = kind or self.main_kind
        objective = self.objective_of(kind)
        found = {n: r for n, r in self.chosen.items() if kind_of(r) == kind and self.objectives[n] == objective}
        return dict(sorted(found.items(), key=lambda item: item[1]["gmacs"]))

    def fit(self, key: str = DISTANCE, kind: Kind | None = None) -> PowerLaw | None:
        """Return the fit through the models of a kind, by default the main one, against gmacs.

        Several runs of one model, such as several seeds, are one point, their geometric mean: as separate points they
        would make the band too narrow.
        """
        models = by_model(r for r in self.scaling(kind).values() if number_of(r, key) is not None)
        return fit_power_law([model.record["gmacs"] for model in models], [model.values(key) for model in models])

    def over_training(self, key: str = DISTANCE) -> dict[str, list[Record]]:
        """Return, for each run, the records that differ from the chosen one only in step; the last of equals counts."""
        metric = next((m.metric for m in MEASURES if m.key == key), "")
        curves = {}
        for name, record in self.chosen.items():
            way = protocol_of(record, metric, ("step",))
            same = {r["step"]: r for r in self.records[name] if protocol_of(r, metric, ("step",)) == way}
            curves[name] = [same[step] for step in sorted(same)]
        return curves

    def over_sampling_steps(self) -> dict[str, list[Record]]:
        """Return, for each run, the records that differ only in the sampler's steps, by steps; empty if there are none.

        Among several such protocols, the one with the most points is used, and among equals the newest.
        """
        families: defaultdict[str, dict[tuple[str, int], Record]] = defaultdict(dict)
        for name, records in self.records.items():
            for record in records if self.is_main(name) else ():
                if (steps := num_sampling_steps(record)) is not None and record["sampling_gmacs"] is not None:
                    family = protocol_of(record, "", ("sampler",)) + json.dumps(record["sampler"]["name"])
                    families[family][name, steps] = record
        swept = {family: _with_several(points) for family, points in families.items()}
        best = max(swept.values(), key=lambda curves: (sum(map(len, curves.values())), _newest(curves)), default={})
        return best


def _most_frequent(kinds: Sequence[Kind]) -> Kind:
    """Return the kind that most have, with preference for the paper's block and family."""

    def preference(kind: Kind) -> tuple[int, bool, bool]:
        return kinds.count(kind), kind.block == paper.MAIN_BLOCK, kind.family == paper.PAPERS_FAMILY

    return max(kinds, key=preference)


def read_study(sweep: Path, only: Sequence[str] | None = None) -> Study:
    """Return the study of the runs in ``sweep``, a folder or a file (`read_runs`), or of those named in ``only``.

    If all runs share several protocols and steps, the latest training step is used; among several protocols, that with
    evaluations at the most steps, so that curves over training show it; among equals, the newest. Runs of several
    objectives may each have a sampler of their own, with the same number of network calls, and U-Nets a decoder of
    their own latents. Raises ValueError where there is no run, no evaluation, or no shared protocol.
    """
    by_run = read_runs(sweep, only)
    evaluated = {name: records for name, records in by_run.items() if records}
    unevaluated = [name for name, records in by_run.items() if not records]
    return Study(sweep, _of_shared_protocol(evaluated, sweep), evaluated, unevaluated)


def _of_shared_protocol(by_run: dict[str, list[Record]], sweep: Path) -> dict[str, Record]:
    """Return one record of each run, all with one protocol and step."""
    if not by_run:
        raise ValueError(
            f"There are 0 evaluated runs in {sweep}: no evaluations.jsonl has a distance; run `ditscale evaluate "
            "checkpoint=RUN` first, or train to a step that evaluate_every divides."
        )
    several = len(set(objectives_of(by_run).values())) > 1
    for protocol in _protocols(several, _own_decoders(by_run)):
        # The last record of equal ones counts.
        ways = [{protocol(record): record for record in records} for records in by_run.values()]
        if shared := set(ways[0]).intersection(*ways):
            break
    else:
        raise ValueError(_why_no_curve(by_run))
    first = next(iter(by_run.values()))

    def preference(way: str) -> tuple[int, int, int]:
        record = ways[0][way]
        family = protocol_of(record, but=("step",))
        steps = {r["step"] for r in first if protocol_of(r, but=("step",)) == family}
        return record["step"], len(steps), first.index(record)

    best = max(shared, key=preference)
    return {name: records[best] for name, records in zip(by_run, ways, strict=True)}


def protocol_of(record: Mapping[str, Any], metric: str = "", but: Sequence[str] = ()) -> str:
    """Return a record's PROTOCOL_KEYS, without those in ``but``, and the settings of a metric, as JSON."""
    settings = record.get("metrics", {}).get(metric)
    return json.dumps([settings, *(record.get(key) for key in PROTOCOL_KEYS if key not in but)], sort_keys=True)


def _protocols(several_objectives: bool, own_decoders: bool) -> list[Callable[[Record], str]]:
    """Return the functions by whose value runs may be compared, the strictest first."""
    ways: list[Callable[[Record], str]] = [protocol_of]
    if several_objectives:
        ways.append(_protocol_at_calls)
    if own_decoders:
        ways.append(partial(protocol_of, but=("decoder",)))
    if own_decoders and several_objectives:
        ways.append(partial(_protocol_at_calls, but=("decoder",)))
    return ways


def _own_decoders(by_run: Mapping[str, Sequence[Record]]) -> bool:
    """Return whether decoders differ between families of U-Nets and networks of blocks, and not among these."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for records in by_run.values():
        for record in records:
            found[paper.PAPERS_FAMILY if record.get("block") else record["family"]].add(record["decoder"])
    return len(found) > 1 and all(len(decoders) == 1 for decoders in found.values())


def _protocol_at_calls(record: Record, but: Sequence[str] = ()) -> str:
    """Return a record's protocol with the number of network calls in the sampler's place, if that is known."""
    calls = num_calls(record)
    return protocol_of(record, but=but) if calls is None else f"{protocol_of(record, but=('sampler', *but))} {calls}"


def number_of(record: Mapping[str, Any], key: str) -> float | None:
    """Return a measured number, or None if it was not measured."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _why_no_curve(by_run: dict[str, list[Record]]) -> str:
    """Return a sentence with the first run that shares no protocol with those before it, and a fact that differs."""
    first, *names = by_run
    several = len(set(objectives_of(by_run).values())) > 1
    own_decoders = _own_decoders(by_run)
    protocol = _protocols(several, own_decoders)[-1]
    shared = {protocol(record): record for record in by_run[first]}
    for name in names:
        ways = {protocol(record): record for record in by_run[name]}
        if not shared.keys() & ways.keys():
            pairs = itertools.product(shared.values(), ways.values())
            one, other = min(pairs, key=lambda pair: len(_differing(*pair)))
            may_differ = {name for name, may in (("sampler", several), ("decoder", own_decoders)) if may}
            key = next((key for key in _differing(one, other) if key not in may_differ), "sampler")
            way = "at one number of network calls" if several and key == "sampler" else "the same way"
            return (
                f"{first} and {name} cannot share a curve: {key} is {json.dumps(one.get(key))} in one and "
                f"{json.dumps(other.get(key))} in the other; evaluate both {way} with `ditscale evaluate`."
            )
        shared = {way: record for way, record in shared.items() if way in ways}
    raise AssertionError("all of them share a protocol")


def _differing(one: Record, other: Record) -> list[str]:
    return [key for key in PROTOCOL_KEYS if one.get(key) != other.get(key)]


def _with_several(points: dict[tuple[str, int], Record]) -> dict[str, list[Record]]:
    curves: defaultdict[str, list[Record]] = defaultdict(list)
    for name, steps in sorted(points):
        curves[name].append(points[name, steps])
    return {name: records for name, records in curves.items() if len(records) > 1}


def _newest(curves: dict[str, list[Record]]) -> int:
    return max((record["step"] for records in curves.values() for record in records), default=0)


def distance_name(record: Mapping[str, Any]) -> str:
    """Return the name of a record's distance."""
    count = record["num_images"]
    images = f"{count // 1000}K" if count % 1000 == 0 else f"{count:,}"
    return f"FID-{images}" if "fid" in record else f"Frechet distance on {record['feature_extractor']}"
