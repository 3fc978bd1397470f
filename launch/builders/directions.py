"""Refuse weights of another program under an objective, or for a program, of the other direction of time.

SiT and the released DiT have one network, under the same names, so the tensors do not say which they are of. The
network of SiT or LightningDiT sees 0 as noise and 1 as data, and an objective with ``reversed_time`` gives it that.
"""

from collections.abc import Mapping
from typing import Any

from diffusion.flow import Flow
from diffusion.objective import Objective
from diffusion.process import GaussianDiffusion
from model.families import FAMILIES
from model.family import Family

SITS_ARGUMENTS = ("path_type", "prediction")  # that its trainer saves and that decide what its network predicts
_PATHS = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}  # SiT's name of a path, and ours
_PREDICTIONS = ("velocity", "noise", "score")  # in both programs


def require_direction(where: str, family: Family | None, objective: Objective) -> None:
    """Raise ValueError where weights would be used with the other direction of time than their family's, if known."""
    if family is None or family.reversed_time == objective.reversed_time:
        return
    if family.reversed_time:
        raise ValueError(
            f"{where} has weights of {family.name}, whose time runs from noise (0) to data (1), but the objective is "
            f"diffusion={objective.name}, whose network sees the opposite; set {family.objective}."
        )
    raise ValueError(
        f"{where} has weights of {family.name}, whose time runs from data to noise, but the objective's network sees "
        f"the opposite, as SiT's does; set {family.objective}."
    )


def require_its_objective(where: str, family: Family | None, objective: Objective) -> None:
    """Raise ValueError where weights of a Gaussian process would be used as they are under another objective."""
    if family is not None and not family.reversed_time and not isinstance(objective, GaussianDiffusion):
        raise ValueError(
            f"{where} has weights of {family.name}, whose objective is {family.objective}, but this job's is "
            f"diffusion={objective.name}; set {family.objective}."
        )


def require_sits_objective(where: str, arguments: Mapping[str, Any], objective: Objective) -> None:
    """Raise ValueError where the arguments of SiT's trainer name another path or prediction than the objective has."""
    if not isinstance(objective, Flow):
        return
    path, prediction = arguments.get("path_type"), arguments.get("prediction")
    for group, said, ours in (
        ("path", _PATHS.get(path) if isinstance(path, str) else None, objective.path.name),
        ("prediction", prediction if prediction in _PREDICTIONS else None, objective.parameterization.name),
    ):
        if said is not None and said != ours:
            raise ValueError(
                f"{where} was trained with {group} {said}, but the objective has diffusion/{group}={ours}; set "
                f"diffusion/{group}={said}."
            )


def require_export(where: str, name: str, reversed_time: bool, target: Family) -> None:
    """Raise ValueError where weights of the family ``name`` would be written for one of the other direction of time."""
    if reversed_time != target.reversed_time:
        others = [f"to={family.program}" for family in FAMILIES if family.reversed_time == reversed_time]
        raise ValueError(
            f"{where} has weights of {name}, whose time runs the other way than that of the program that they would "
            f"be written for; give {' or '.join(others)}."
        )


def arguments_for(target: Family, objective: Objective) -> dict[str, str]:
    """Return the arguments by which a file states its family, for a network that was trained with an objective.

    Raises ValueError for an objective that the family's program does not have.
    """
    if not target.reversed_time:
        return {}
    if not isinstance(objective, Flow) or not objective.reversed_time:
        raise ValueError(
            f"to={target.program} needs a network that sees {target.name}'s time, trained with {target.objective}, but "
            f"this one is of diffusion={objective.name}; use "
            f"{'to=reference' if objective.name == 'gaussian' else 'our format'}."
        )
    paths = {ours: theirs for theirs, ours in _PATHS.items()}
    prediction = objective.parameterization.name
    if objective.path.name not in paths or prediction not in _PREDICTIONS:
        raise ValueError(
            f"{target.name}'s program has the predictions {', '.join(_PREDICTIONS)}, but this network has "
            f"{prediction}; keep it in our format."
        )
    return {"model": target.name, "path_type": paths[objective.path.name], "prediction": prediction}
