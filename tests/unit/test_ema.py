"""Averages of the weights equal closed forms; averages of any width are made after training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import FACTS, save
from torch import Tensor, nn

from train.checkpoint import load_checkpoint, load_weights, read_tensors
from train.ema import Averages, constant, gamma_of, power, relative_std_of, several, warmed_up
from train.posthoc import Profile, coefficients, inner_product, reconstruct
from train.state import TrainState

STEPS = 400


def path_of_weights(steps: int = STEPS) -> Tensor:
    """Return a random walk of one weight, [steps + 1] with the weights at the start."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps + 1, generator=generator, dtype=torch.float64).cumsum(0)


def follow(model: nn.Linear, averages: Averages, weights: Tensor, first: int = 1) -> None:
    for value in weights[first:]:
        with torch.no_grad():
            model.weight.fill_(value.item())
        averages.update()


def one_weight() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(path_of_weights()[0].item())
    return model


def value_of(averages: Averages, name: str = "ema") -> float:
    return averages.modules[name].weight.item()


def by_hand(weights: Tensor, kept: list[float]) -> float:
    """Compute the recursion in float64."""
    average = weights[0].item()
    for value, decay in zip(weights[1:].tolist(), kept, strict=True):
        average = decay * average + (1 - decay) * value
    return average


def test_a_constant_decay_is_a_geometric_sum() -> None:
    model, weights = one_weight(), path_of_weights()
    averages = constant(model, 0.98)
    follow(model, averages, weights)
    ages = torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
    expected = 0.98**STEPS * weights[0] + (0.02 * 0.98**ages * weights[1:]).sum()
    assert value_of(averages) == pytest.approx(expected.item(), rel=1e-5)


def test_warming_up_keeps_little_of_the_first_weights() -> None:
    model, weights = one_weight(), path_of_weights()
    averages = warmed_up(model, 0.98)
    follow(model, averages, weights)
    kept = [min(0.98, (1 + n) / (10 + n)) for n in range(1, STEPS + 1)]
    assert value_of(averages) == pytest.approx(by_hand(weights, kept), rel=1e-5)
    assert math.prod(kept[:20]) < 1e-3 < 0.98**20


def test_several_decays_are_each_what_they_are_alone() -> None:
    model, weights = one_weight(), path_of_weights()
    together, alone = several(model, [0.9, 0.99]), [constant(model, 0.9), constant(model, 0.99)]
    follow(model, Averages(together.by_name), weights)
    for averages in alone:
        follow(model, averages, weights)
    assert list(together.modules) == ["ema", "ema_0.99"]
    assert value_of(together) == value_of(alone[0])
    assert value_of(together, "ema_0.99") == value_of(alone[1])
    with pytest.raises(ValueError, match="one or more different decays"):
        several(model, [0.9, 0.9])


def power_average(weights: Tensor, gamma: float) -> float:
    """Return the average in which step i counts as the integral of tau^gamma from i - 1 to i."""
    edges = torch.arange(len(weights), dtype=torch.float64) ** (gamma + 1)
    return ((edges[1:] - edges[:-1]) * weights[1:]).sum().item() / edges[-1].item()


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_power_average_is_the_integral_and_forgets_the_start(width: float) -> None:
    model, weights = one_weight(), path_of_weights()
    averages = power(model, [width])
    follow(model, averages, weights)
    assert value_of(averages) == pytest.approx(power_average(weights, gamma_of(width)), rel=1e-5)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_widths_and_exponents_are_those_of_the_paper(width: float, gamma: float) -> None:
    assert gamma_of(width) == pytest.approx(gamma, abs=0.005)
    assert relative_std_of(gamma_of(width)) == pytest.approx(width, rel=1e-9)
    tau = np.linspace(0, 1, 200_001)
    profile = tau ** gamma_of(width) / (tau ** gamma_of(width)).sum()
    mean = (profile * tau).sum()
    assert math.sqrt((profile * (tau - mean) ** 2).sum()) == pytest.approx(width, rel=1e-3)
    with pytest.raises(ValueError, match=r"The width 0.3 of an average is not in \(0, 0.28\)"):
        gamma_of(0.3)


def test_inner_products_are_the_integrals() -> None:
    first, second = Profile(300, 16.97), Profile(400, 6.94)
    tau = (np.arange(400_000) + 0.5) / 1000
    one = np.where(tau < 300, 17.97 * tau**16.97 / 300.0**17.97, 0.0)
    other = 7.94 * tau**6.94 / 400.0**7.94
    assert inner_product(first, second) == pytest.approx((one * other).sum() / 1000, rel=1e-4)
    assert inner_product(first, second) == inner_product(second, first)


def test_a_kept_average_is_reconstructed_as_itself() -> None:
    snapshots = [Profile(step, gamma) for step in (100, 200, 300) for gamma in (16.97, 6.94)]
    np.testing.assert_allclose(coefficients(snapshots, snapshots[5]), [0, 0, 0, 0, 0, 1], atol=1e-6)


def state_with(model: nn.Module, averages: Averages) -> TrainState:
    return TrainState(model, averages, torch.optim.AdamW(model.parameters()), batch_size=4, total_steps=STEPS)


def test_an_average_of_any_width_is_made_after_training(tmp_path: Path) -> None:
    """Compare with an average that followed the run, within a small part of the weights' path."""
    model, weights = one_weight(), path_of_weights()
    averages = power(model, [0.05, 0.1])
    state = state_with(model, averages)
    facts = {**FACTS, "config": {"ema": {"_target_": "train.ema.power", "relative_stds": [0.05, 0.1]}}}
    for step in range(20, STEPS + 1, 20):
        follow(model, averages, weights[: step + 1], first=step - 19)
        state.step = step
        save(tmp_path, state, facts)
    checkpoints = sorted(tmp_path.iterdir())
    for width in (0.05, 0.07, 0.1, 0.15):
        made = reconstruct(checkpoints, width)["weight"].item()
        expected = power_average(weights, gamma_of(width))
        assert made == pytest.approx(expected, abs=0.01 * weights.std().item()), width
    assert abs(power_average(weights, gamma_of(0.15)) - value_of(averages)) > 0.1 * weights.std().item()
    save(tmp_path / "other", state)
    with pytest.raises(ValueError, match="from which no other width can be computed; train with train/ema=power"):
        reconstruct([tmp_path / "other/step_00000400"], 0.1)


@pytest.mark.parametrize(
    "make", [lambda m: power(m, [0.05, 0.1]), lambda m: warmed_up(m), lambda m: several(m, [0.9, 0.5])]
)
def test_averages_continue_bit_for_bit_from_a_checkpoint(tmp_path: Path, make: object) -> None:
    weights, model = path_of_weights(), one_weight()
    averages = make(model)  # type: ignore[operator]
    state = state_with(model, averages)
    follow(model, averages, weights[:11])
    state.step = 10
    save(tmp_path, state)
    follow(model, averages, weights[:21], first=11)
    other = one_weight()
    restored = state_with(other, make(other))  # type: ignore[operator]
    load_checkpoint(tmp_path / "step_00000010", restored)
    follow(other, restored.ema, weights[:21], first=11)
    for name in averages.modules:
        assert value_of(restored.ema, name) == value_of(averages, name)


def test_weights_that_a_checkpoint_has_not_are_named_with_those_that_it_has(tmp_path: Path) -> None:
    model = one_weight()
    save(tmp_path, state_with(model, several(model, [0.9, 0.5])))
    load_weights(model, tmp_path / "step_00000000", "ema_0.5")
    with pytest.raises(ValueError, match=r"has no weights 'emma'; it has ema, ema_0.5, model"):
        read_tensors(tmp_path / "step_00000000", "emma")
