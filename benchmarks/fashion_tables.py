"""Print the tables of docs/fashion.md from the committed evaluations of the Fashion-MNIST studies.

``python -m benchmarks.fashion_tables`` prints Markdown. A distance is the geometric mean over training seeds, with the
least and the greatest in brackets.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from report.models import model_name
from report.records import Record
from report.seeds import Seeds, by_model
from report.study import Study, read_study

RESULTS = Path(__file__).parent / "results" / "fashion"
STUDIES = ("scaling", "sampling", "blocks", "objectives", "unets")
ROWS = {"sampling": "scaling"}  # studies whose evaluations are in the file of another


def table(study: str) -> str:
    """Return the Markdown table of one of STUDIES."""
    found = read_study(RESULTS / f"{ROWS.get(study, study)}.jsonl")
    return {"scaling": _scaling, "sampling": _sampling}.get(study, _chosen)(found)


def _scaling(study: Study) -> str:
    rows = [["model", "Gflops", "parameters", "distance, step 500", "distance, step 1,000", "recognized"]]
    early = {model_name(m.record): m for m in by_model(curve[0] for curve in study.over_training().values())}
    for model in by_model(study.scaling().values()):
        name = model_name(model.record)
        rows.append([name, *_costs(model.record), _distance(early[name]), _distance(model), _recognized(model)])
    return _markdown(rows)


def _sampling(study: Study) -> str:
    curves = {model_name(records[0]): records for records in study.over_sampling_steps().values()}
    steps = [record["sampler"]["steps"] for record in next(iter(curves.values()))]
    rows = [["model", "Gflops of a step", *(f"{count} steps" for count in steps)]]
    for name, records in sorted(curves.items()):
        rows.append([name, f"{records[0]['gmacs']:.6f}", *(f"{r['frechet_distance']:.1f}" for r in records)])
    return _markdown(rows)


def _chosen(study: Study) -> str:
    """Return the rows of models that differ in something else than their shape."""
    groups: dict[str, list[Record]] = {}
    for name, record in study.chosen.items():
        groups.setdefault(name.rsplit("-seed", 1)[0], []).append(record)
    found = sorted((Seeds(tuple(records)).mean(), name) for name, records in groups.items())
    rows = [["model", "Gflops", "parameters", "distance", "recognized"]]
    for _, name in found:
        seeds = Seeds(tuple(groups[name]))
        rows.append([f"`{name}`", *_costs(seeds.record), _distance(seeds), _recognized(seeds)])
    return _markdown(rows)


def _costs(record: Record) -> tuple[str, str]:
    return f"{record['gmacs']:.6f}", f"{record['parameters']:,}"


def _distance(model: Seeds) -> str:
    values = model.values()
    return f"{model.mean():.1f} ({min(values):.1f} to {max(values):.1f})"


def _recognized(model: Seeds) -> str:
    return f"{100 * statistics.mean(model.values('recognized_fraction')):.1f}%"


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rest])


def main() -> None:
    for study in STUDIES:
        if (RESULTS / f"{ROWS.get(study, study)}.jsonl").exists():
            print(f"{study}\n\n{table(study)}\n")


if __name__ == "__main__":
    main()
