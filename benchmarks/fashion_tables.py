"""Print the tables of docs/fashion.md from the committed evaluations of the Fashion-MNIST studies.

``python -m benchmarks.fashion_tables`` prints Markdown. A distance is the geometric mean over training seeds, with the
least and the greatest in brackets.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from report.models import model_name
from report.records import Record
from report.seeds import Seeds, by_model, curves_by_model
from report.study import Study, read_study

RESULTS = Path(__file__).parent / "results" / "fashion"
STUDIES = ("scaling", "sampling", "blocks", "objectives", "unets", "learning_rates")
ROWS = {"sampling": "scaling", "learning_rates": "unets"}  # studies whose evaluations are in the file of another
RATES = {"0.001": "unets_lr_1e-3", "0.002": "unets_lr_2e-3", "0.004": "unets"}  # learning rate -> file


def table(study: str) -> str:
    """Return the Markdown table of one of STUDIES."""
    if study == "learning_rates":
        return _learning_rates()
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
    curves = curves_by_model(study.over_sampling_steps().values(), _steps)
    rows = [["model", "Gflops of a step", *(f"{_steps(seeds.record)} steps" for seeds in curves[0])]]
    for curve in sorted(curves, key=lambda curve: model_name(curve[0].record)):
        record = curve[0].record
        rows.append([model_name(record), f"{record['gmacs']:.6f}", *map(_distance, curve)])
    return _markdown(rows)


def _steps(record: Record) -> int:
    return int(record["sampler"]["steps"])


def _chosen(study: Study) -> str:
    """Return the rows of models that differ in something else than their shape."""
    rows = [["model", "Gflops", "parameters", "distance", "recognized"]]
    for name, seeds in sorted(_by_name(study).items(), key=lambda item: item[1].mean()):
        rows.append([f"`{name}`", *_costs(seeds.record), _distance(seeds), _recognized(seeds)])
    return _markdown(rows)


def _learning_rates() -> str:
    """Return the rows of the networks of fashion/unets, with a column for each learning rate."""
    by_rate = [_by_name(read_study(RESULTS / f"{name}.jsonl")) for name in RATES.values()]
    rows = [["model", *(f"lr {rate}" for rate in RATES)]]
    rows += [[f"`{name}`", *(_distance(models[name]) for models in by_rate)] for name in sorted(by_rate[0])]
    return _markdown(rows)


def _by_name(study: Study) -> dict[str, Seeds]:
    """Return the seeds of each run's name without its seed."""
    groups: dict[str, list[Record]] = {}
    for name, record in study.chosen.items():
        groups.setdefault(name.rsplit("-seed", 1)[0], []).append(record)
    return {name: Seeds(tuple(records)) for name, records in groups.items()}


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
