"""Define the training state that a checkpoint saves."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.network import Network
from train.ema import Averages


@dataclass
class TrainState:
    """The mutable state of training. ``step`` alone determines random numbers and the order of data."""

    model: Network  # unwrapped; on the CPU until the runtime prepares it
    ema: Averages
    optimizer: torch.optim.Optimizer  # the runtime may return another one
    batch_size: int  # global
    total_steps: int
    step: int = 0  # optimizer steps done
    interval: dict[str, list[float]] = field(default_factory=dict)  # metrics of the steps since the last log line
    recent_grad_norms: list[float] = field(default_factory=list)  # up to the last log line, if a guard needs them

    @property
    def images_seen(self) -> int:
        """Return the number of training samples consumed so far, over all processes."""
        return self.step * self.batch_size

    @property
    def finished(self) -> bool:
        """Return whether the last step is done."""
        return self.step >= self.total_steps

    def advance(self) -> None:
        """Count one more step."""
        self.step += 1


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer state by ``{parameter name}/{quantity}``.

    Names, unlike indices, do not depend on the runtime and on parameter groups.
    """
    return {
        f"{name}/{quantity}": value
        for name, parameter in model.named_parameters()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


class OtherShapeError(ValueError):
    """The optimizer state is that of a different model."""


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the tensors that `optimizer_tensors` returned. Hyperparameters remain those of the config.

    Raises OtherShapeError for state of an unknown parameter, and for state that is neither a scalar nor of its
    parameter's shape.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = {name: parameter.shape for parameter, name in names.items()}
    for key, value in tensors.items():
        expected = shapes.get(key.rpartition("/")[0])
        if expected is None or value.shape not in (expected, ()):
            raise OtherShapeError(
                f"the optimizer has {key} of shape {tuple(value.shape)}, but the model "
                + ("has no such parameter." if expected is None else f"a parameter of shape {tuple(expected)}.")
            )
    by_parameter: dict[str, dict[str, Tensor]] = {name: {} for name in shapes}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        by_parameter[name][quantity] = value
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: by_parameter[names[parameter]] for index, parameter in enumerate(ordered)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
