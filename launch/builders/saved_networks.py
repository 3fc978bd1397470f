"""Read the network of a checkpoint, with any of its averages as weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.objective import Objective
from diffusion.process import GaussianDiffusion
from launch.builders.components import build_saved
from launch.builders.normalization import saved_normalization
from launch.builders.runs import pinned_sources, read_checkpoint
from launch.builders.saved_configs import component
from model.autoencoder import Autoencoder
from model.network import Network
from model.normalized import Statistics, statistics_of
from model.training_head import without_head
from train import posthoc
from train.checkpoint import fill, read_state_file, read_tensors
from train.stores import STATE_FILE

_MEANING = ("name", "path", "prediction", "sigma_data")  # facts on an objective that decide what an output means


def load_model(where: str, weights: str, objective: Objective, setting: str) -> Network:
    """Return the network of a run's newest checkpoint, or of one checkpoint's folder, for an objective.

    ``weights`` is as for `model_at`. Raises ValueError for a missing or damaged checkpoint, one that asks for foreign
    code, and one whose time runs the other way than the objective's, naming the ``setting``.
    """

    def load(path: Path) -> Network:
        reverses = objective_at(path).reversed_time
        if reverses != objective.reversed_time:
            ways = ["from noise to data, as SiT's (diffusion=sit)", "from data to noise"]
            theirs, ours = ways if reverses else ways[::-1]
            raise ValueError(
                f"{setting} {where} was trained with a time that runs {theirs}, but the time of this job's objective, "
                f"diffusion={objective.name}, runs {ours}; give weights of the same direction."
            )
        return model_at(path, weights)

    return read_checkpoint(where, load)


def load_guide(where: str, objective: Objective, autoencoder: Autoencoder) -> Network:
    """Return the network by which another, of latents of ``autoencoder``, is guided. Raises as `load_model`.

    Raises ValueError too where the guide predicts another quantity, or one of latents that are normalized otherwise.
    """
    network = load_model(where, "ema", objective, "guidance.guide")
    of_guide = read_checkpoint(where, objective_at)
    theirs, ours = of_guide.facts(), objective.facts()
    for key in _MEANING:
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"guidance.guide {where} was trained with the {key} {theirs.get(key)} of an objective, but the guided "
                f"network with {ours.get(key)}, so their outputs cannot be combined; guide by a model of the same one."
            )
    if _betas_of(of_guide) != _betas_of(objective):
        raise ValueError(
            f"guidance.guide {where} was trained with another diffusion/schedule than the guided network, so their "
            "outputs cannot be combined; guide by a model of the same one."
        )
    if read_checkpoint(where, _statistics_at) != statistics_of(autoencoder):
        raise ValueError(
            f"guidance.guide {where} was trained with other data.normalize, data.latent_mean or data.latent_std than "
            "the guided network, so their outputs cannot be combined; guide by a model of the same latents."
        )
    return network


def _betas_of(objective: Objective) -> list[float]:
    """Return the betas of a Gaussian process; none for other objectives."""
    return objective.tables.betas.tolist() if isinstance(objective, GaussianDiffusion) else []


def _statistics_at(path: Path) -> Statistics | None:
    said_by = str(path / STATE_FILE)
    saved = saved_normalization(read_state_file(path)["config"], said_by)
    if not saved.normalize or saved.latent_mean is None or saved.latent_std is None:
        return None
    return Statistics(tuple(saved.latent_mean), tuple(saved.latent_std))


def objective_at(path: Path) -> Objective:
    """Return the objective of a pinned checkpoint."""
    said_by = str(path / STATE_FILE)
    objective: Objective = build_saved(component(read_state_file(path)["config"], "diffusion", said_by), said_by)
    return objective


def model_at(path: Path, weights: str) -> Network:
    """Return the network of a pinned checkpoint.

    ``weights`` is ``model``, the name of an average, or ``width_W``: the power-function average of that width,
    reconstructed from the run's checkpoints up to this one. Raises ValueError for a damaged checkpoint, or one that
    asks for foreign code.
    """
    with pinned_sources(path, weights) as sources:
        return model_of_sources(sources, weights)


def model_of_sources(sources: Sequence[Path], weights: str) -> Network:
    """Return the network of the last of ``sources``, pinned checkpoints from all of which its weights are computed."""
    path = sources[-1]
    section = component(read_state_file(path)["config"], "model", str(path / STATE_FILE))
    section["outputs_per_channel"] = objective_at(path).outputs_per_channel
    if weights.startswith(posthoc.PREFIX):
        return _model_of(path, section, posthoc.reconstruct(sources, _width(weights)))
    return _model_of(path, section, without_head(read_tensors(path, weights)))


def _model_of(path: Path, section: Mapping[str, Any], tensors: dict[str, Tensor]) -> Network:
    """Return the model of a checkpoint's config with the tensors of its file, after a check that their shapes agree.

    A config may ask for a model of any size: nothing is allocated before the file is known to have its tensors.
    """
    said_by = str(path / STATE_FILE)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_saved(section, said_by).state_dict().items()}
    for name in [*shapes, *tensors]:
        theirs, ours = tensors.get(name), shapes.get(name)
        if theirs is None or ours is None or theirs.shape != ours:
            shown = [
                None if shape is None else tuple(shape) for shape in (theirs if theirs is None else theirs.shape, ours)
            ]
            raise ValueError(
                f"The checkpoint {path} does not fit its own config: the shape of {name} is {shown[0]} in its weights "
                f"and {shown[1]} by its config; use another checkpoint of that run."
            )
    model: Network = build_saved(section, said_by)
    fill(model, path, tensors)
    return model


def _width(weights: str) -> float:
    try:
        return float(weights.removeprefix(posthoc.PREFIX))
    except ValueError as error:
        raise ValueError(
            f"weights is {weights!r}, but what follows {posthoc.PREFIX} must be a number such as 0.1."
        ) from error
