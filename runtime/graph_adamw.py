"""Define AdamW for a training step that is one compiled graph."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class GraphAdamW(torch.optim.AdamW):
    """AdamW whose graph never changes: its state exists from the start, and the learning rate is a device tensor.

    XLA would merge a learning rate that is a Python number with any equal number of the step, such as one minus the
    averages' decay, which would change the graph. `continuing` constructs it.
    """

    found_inf: Tensor | None = None  # [] float32, 1 to skip the next step, as in PyTorch's fused AdamW
    _put: Callable[[Tensor], Tensor]
    _keeps_gradients: bool
    _num_steps: Tensor  # [] float32, shared by all parameters
    _rates: dict[int, tuple[float, Tensor]]  # of each group

    @classmethod
    def continuing(
        cls,
        optimizer: torch.optim.Optimizer,
        on_host: Mapping[str, nn.Parameter],
        model: nn.Module,
        spread: Callable[[str, Tensor], Tensor],
        put: Callable[[Tensor], Tensor],
        keeps_gradients: bool,
    ) -> "GraphAdamW":
        """Return an optimizer with the groups and state of ``optimizer``, whose parameters are ``on_host``, by name.

        ``keeps_gradients`` sets gradients to zero instead of dropping them, for micro-batches. Raises ValueError where
        ``optimizer`` is not plain AdamW.
        """
        if type(optimizer) is not torch.optim.AdamW or optimizer.defaults["amsgrad"] or optimizer.defaults["maximize"]:
            found = {key: optimizer.defaults.get(key) for key in ("amsgrad", "maximize")}
            given = " and ".join(f"optimizer.{key}" for key, value in found.items() if value)
            way_out = f"leave {given} out" if type(optimizer) is torch.optim.AdamW else "use train/optimizer=adamw"
            raise ValueError(
                f"runtime=xla steps with plain AdamW, but optimizer is {type(optimizer).__name__} with {found}; "
                f"{way_out}."
            )
        on_device, names = dict(model.named_parameters()), {value: name for name, value in on_host.items()}
        groups = [
            {**group, "params": [on_device[names[p]] for p in group["params"]]} for group in optimizer.param_groups
        ]
        self = cls(groups, lr=optimizer.defaults["lr"])
        self._put, self._keeps_gradients = put, keeps_gradients
        self._rates = {}
        steps = [state["step"] for state in optimizer.state.values()]
        self._num_steps = put(torch.tensor(float(steps[0]) if steps else 0.0))
        for name, before in on_host.items():
            old = optimizer.state.get(before, {})
            moments = {
                key: spread(name, old.get(key, torch.zeros_like(before.detach()))) for key in ("exp_avg", "exp_avg_sq")
            }
            self.state[on_device[name]] = {"step": self._num_steps, **moments}
            if keeps_gradients:
                on_device[name].grad = spread(name, torch.zeros_like(before.detach()))
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or zero them for the next micro-batches; else the graph would output them."""
        super().zero_grad(set_to_none and not self._keeps_gradients)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters by algorithm 2 of Loshchilov & Hutter 2019, with the bias corrections of Adam."""
        if self.found_inf is None:
            return self._update()
        moments = [state[key] for state in self.state.values() for key in ("exp_avg", "exp_avg_sq")]
        values = [self._num_steps, *(p for group in self.param_groups for p in group["params"]), *moments]
        before = [value.clone() for value in values]
        self._update()
        for value, old in zip(values, before, strict=True):
            value.mul_(1 - self.found_inf).add_(old * self.found_inf)  # exact for 0 and 1, and keeps the sharding

    def _update(self) -> None:
        self._num_steps.add_(1)
        for number, group in enumerate(self.param_groups):
            rate, decay = self._rate(number, group["lr"]), group["weight_decay"]
            beta1, beta2 = group["betas"]
            # 1 - beta^step, without float32's cancellation at small steps.
            step_size = rate / -torch.expm1(self._num_steps * math.log(beta1))
            correction2 = torch.sqrt(-torch.expm1(self._num_steps * math.log(beta2)))
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if decay:
                    parameter.mul_(1 - rate * decay)
                mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                parameter.sub_(step_size * mean / (square.sqrt() / correction2 + group["eps"]))

    def _rate(self, number: int, value: float) -> Tensor:
        """Return a group's learning rate on the device, sent again if it changed."""
        if number not in self._rates or self._rates[number][0] != value:
            self._rates[number] = value, self._put(torch.tensor(value, dtype=torch.float32))
        return self._rates[number][1]
