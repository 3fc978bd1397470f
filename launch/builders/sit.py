"""Tell weights of SiT from those of DiT, and refuse them under an objective of the other direction of time.

Both programs have one network, under the same names, so the tensors do not say which they are of. SiT's network sees 0
as noise and 1 as data, and an objective with ``reversed_time`` (diffusion=sit) gives it that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.flow import Flow
from diffusion.objective import Objective
from diffusion.process import GaussianDiffusion

SIT, DIT = "SiT", "DiT"
SITS_ARGUMENTS = ("path_type", "prediction")  # that its trainer saves and that decide what its network predicts
_PATHS = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}  # SiT's name of a path, and ours
_PREDICTIONS = ("velocity", "noise", "score")  # in both programs


def program_of(path: Path, arguments: Mapping[str, Any]) -> str | None:
    """Return the program that weights are of, where its trainer's arguments or the name of a released file say it.

    `ditscale export to=sit` writes such arguments; a diffusers folder is always DiT's.
    """
    model = arguments.get("model")
    for program in (SIT, DIT):
        if isinstance(model, str) and model.split("-")[0] == program:
            return program
    if "path_type" in arguments:
        return SIT
    if path.suffix:
        return next((program for program in (SIT, DIT) if path.name.startswith(f"{program}-")), None)
    return DIT


def require_direction(where: str, program: str | None, objective: Objective) -> None:
    """Raise ValueError where weights of one program would be used with the other's direction of time."""
    if program == SIT and not objective.reversed_time:
        raise ValueError(
            f"{where} has weights of SiT, whose time runs from noise (0) to data (1), but the objective is "
            f"diffusion={objective.name}, whose network sees the opposite; set diffusion=sit."
        )
    if program == DIT and objective.reversed_time:
        raise ValueError(
            f"{where} has weights of DiT, whose time runs from data to noise, but the objective's network sees the "
            "opposite, as SiT's does; set diffusion=gaussian."
        )


def require_dits_objective(where: str, program: str | None, objective: Objective) -> None:
    """Raise ValueError where weights of DiT would be used as they are under another objective than DiT's."""
    if program == DIT and not isinstance(objective, GaussianDiffusion):
        raise ValueError(
            f"{where} has weights of DiT, whose objective is diffusion=gaussian, but this job's is "
            f"diffusion={objective.name}; set diffusion=gaussian."
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


def require_export(where: str, program: str | None, for_sit: bool) -> None:
    """Raise ValueError where weights would be written for the program of the other direction of time."""
    if program is not None and (program == SIT) != for_sit:
        to = "to=reference or to=diffusers" if for_sit else "to=sit"
        raise ValueError(
            f"{where} has weights of {program}, whose time runs the other way than that of the program that they would "
            f"be written for; give {to}."
        )


def sits_arguments(objective: Objective) -> dict[str, str]:
    """Return the arguments by which a file states what it is, as SiT's trainer names them.

    Raises ValueError for an objective that SiT's program does not have.
    """
    if not isinstance(objective, Flow) or not objective.reversed_time:
        raise ValueError(
            "to=sit needs a network that sees SiT's time, trained with diffusion=sit, but this one is of "
            f"diffusion={objective.name}; use {'to=reference' if objective.name == 'gaussian' else 'our format'}."
        )
    paths = {ours: theirs for theirs, ours in _PATHS.items()}
    prediction = objective.parameterization.name
    if objective.path.name not in paths or prediction not in _PREDICTIONS:
        raise ValueError(
            f"SiT's program has the predictions {', '.join(_PREDICTIONS)}, but this network has {prediction}; keep it "
            "in our format."
        )
    return {"model": SIT, "path_type": paths[objective.path.name], "prediction": prediction}
