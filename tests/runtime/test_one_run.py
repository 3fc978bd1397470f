"""Every runtime trains the run of a few plain lines of eager PyTorch: losses and state to 1e-5 relative in fp32."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_text_encoders import write_small_clip, write_small_t5
from tiny_run import Case
from warm_python import FAST_COMPILE, TRAINING, WITH_XLA, run_warm_python

from model.training_head import HEAD
from runtime.sharding import sharding_of

HERE = Path(__file__).parent
# Learning rates that equal other numbers of the step: 0, eps, one minus the averages' decay, one minus beta2, and 1.
WARM_UP = [0.0, 1e-6, 5e-5, 1e-4, 1e-3, 5e-4, 1e-4, 1e-6, 0.0, 2e-4, 1e-4, 1.0]
STEPS = len(WARM_UP)


def case(name: str, like: str, runtime: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "like": like, "runtime": runtime, **fields}


def xla(name: str, like: str, devices: int, mode: str = "replicated", **fields: Any) -> dict[str, Any]:
    settings = {"cpu_devices": devices, "mode": mode, **fields.pop("settings", {})}
    return case(name, like, "xla", settings=settings, **fields)


SKIP_OVER = [0.835] * 6 + [0.715] * 6  # gradient norm: a threshold that changes on the way, as at a log step

RECIPES: dict[str, dict[str, Any]] = {
    "adaln_zero": {},
    "adaln": {"block": "AdaLNBlock", "depth": 2, "modern": True, "aligned_steps": 8},
    "cross_attention": {"block": "CrossAttentionBlock", "text": "t5"},
    "in_context": {"block": "InContextBlock", "text": "clip", "qk_norm": True, "depth": 2, "aligned_steps": 8},
    "warm_up": {
        "learning_rates": WARM_UP,
        "max_grad_norm": 0.35,
        "objective": "edm",
        "block": "AdaLNZeroSharedCrossBlock",
        "text": "embedded",
        "depth": 2,
    },
    "skipping": {"skip_over": SKIP_OVER},
    # Units two levels deep, whose arguments are trees.
    "deep": {"block": "Deep", "average": "power", "objective": "flow"},
    "adm": {"block": "ADM"},
    "ldm": {"block": "LDM"},
    "sd": {"block": "SD", "text": "embedded"},
}
# All cases of one line run in one process, or in one pair of processes. A case costs the compilation of its step:
# each covers several recipes, modes and settings that no other has together.
ACCELERATE_1 = [
    case("accelerate-1", "adaln_zero", "accelerate"),
    case("accelerate-1-micro-batches", "cross_attention", "accelerate", settings={"micro_batches": 4}),
    case("accelerate-1-warm-up", "warm_up", "accelerate"),
    case("accelerate-1-deep", "deep", "accelerate", activation_checkpointing=True),
]
ACCELERATE_2 = [
    case("accelerate-2", "adaln_zero", "accelerate"),
    case("accelerate-2-fsdp-skipping", "skipping", "accelerate", settings={"mode": "fsdp"}),
    case("accelerate-2-micro-batches", "adaln", "accelerate", settings={"micro_batches": 2}, counts_exchanged=True),
    case("accelerate-2-fsdp", "in_context", "accelerate", settings={"mode": "fsdp"}, activation_checkpointing=True),
    case("accelerate-2-deep", "deep", "accelerate"),
    case("accelerate-2-fsdp-deep", "deep", "accelerate", settings={"mode": "fsdp"}, activation_checkpointing=True),
    case("accelerate-2-adm", "adm", "accelerate"),
    case("accelerate-2-fsdp-ldm", "ldm", "accelerate", settings={"mode": "fsdp"}, activation_checkpointing=True),
    case("accelerate-2-fsdp-sd", "sd", "accelerate", settings={"mode": "fsdp"}, activation_checkpointing=True),
    case("accelerate-2-fsdp-micro", "warm_up", "accelerate", settings={"mode": "fsdp", "micro_batches": 2}),
]
XLA_1 = [
    xla("xla-1", "adaln_zero", 1),
    xla("xla-1-fsdp", "in_context", 1, "fsdp"),
]
XLA_4 = [
    xla("xla-4", "warm_up", 4),
    xla("xla-4-zero1", "adaln", 4, "zero1"),
    xla("xla-4-fsdp", "skipping", 4, "fsdp"),
    xla("xla-4-fsdp-deep", "deep", 4, "fsdp", activation_checkpointing=True),
    xla("xla-4-fsdp-adm", "adm", 4, "fsdp", activation_checkpointing=True),
    xla("xla-4-ldm", "ldm", 4),
]
XLA_8 = [
    xla("xla-8", "cross_attention", 8, activation_checkpointing=True),
    xla("xla-8-data-and-fsdp", "in_context", 8, "fsdp", settings={"fsdp_devices": 4}),
    xla("xla-8-micro-batches", "adaln", 8, "fsdp", settings={"micro_batches": 2}),
]
# More combinations, for `make soak`: what is new in each, other cases have with other partners.
XLA_4_SOAK = [
    xla("xla-4-deep", "deep", 4),
    xla("xla-4-fsdp-sd", "sd", 4, "fsdp"),
]
XLA_8_SOAK = [
    xla("xla-8-zero1", "adaln_zero", 8, "zero1"),
    xla("xla-8-fsdp", "warm_up", 8, "fsdp", activation_checkpointing=True),
]
if os.environ.get("DITSCALE_CASES") == "all":
    XLA_4, XLA_8 = [*XLA_4, *XLA_4_SOAK], [*XLA_8, *XLA_8_SOAK]
XLA = [*XLA_1, *XLA_4, *XLA_8]
BF16 = [
    xla("xla-4-bf16", "adaln_zero", 4, "fsdp", precision="bf16", activation_checkpointing=True),
    case("accelerate-1-bf16", "adaln_zero", "accelerate", precision="bf16"),
]


def train(cases: list[dict[str, Any]], out: Path, processes: int = 1, env: dict[str, str] | None = None) -> None:
    """Run ``tiny_run`` on the cases; each gets the fields of the recipe that it must equal."""
    full = [
        {"steps": STEPS, **RECIPES[c["like"]], **{key: value for key, value in c.items() if key != "like"}}
        for c in cases
    ]
    modules = WITH_XLA if any(c["runtime"] == "xla" for c in cases) else TRAINING
    run_warm_python(modules, str(HERE / "tiny_run.py"), str(out), json.dumps(full), cwd=out, ranks=processes, env=env)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all runs' files."""
    folder = tmp_path_factory.mktemp("runs")
    write_small_clip(folder / "clip")
    write_small_t5(folder / "t5")
    train([*(case(name, name, "plain") for name in RECIPES), *ACCELERATE_1, BF16[1]], folder)
    train(ACCELERATE_2, folder, processes=2)
    for cases in (XLA_1, [*XLA_4, BF16[0]], XLA_8):
        train(cases, folder, env=FAST_COMPILE)
    return folder


def facts_of(out: Path, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return facts


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the relative distance of two tensors: the norm of the difference over the norm."""
    return ((one - other).norm() / other.norm()).item()


# The biases of keys, which softmax cancels; queries and keys of an LDM's attention to one token, whose weight is 1.
WITHOUT_GRADIENT = re.compile(
    r"optimizer/.+((norm_key|to_k)\.bias|attn2\.to_[qk]\.weight|blocks\.0\.norm2\.\w+)/exp_avg.*"
)


def has_meaning(name: str) -> bool:
    """Return False for the moments of parameters whose gradient is only rounding."""
    return WITHOUT_GRADIENT.fullmatch(name) is None


EXACT = [*ACCELERATE_1, *ACCELERATE_2, *XLA]


@pytest.mark.parametrize(("name", "like"), [(c["name"], c["like"]) for c in EXACT])
def test_losses_weights_averages_and_moments_are_those_of_plain_pytorch(out: Path, name: str, like: str) -> None:
    assert len(facts_of(out, name)["losses"]) == STEPS
    assert_same_run(out, name, like)


def assert_same_run(out: Path, name: str, like: str) -> None:
    """Check that losses, norms and the final state are equal to 1e-5 relative."""
    facts, expected = facts_of(out, name), facts_of(out, like)
    assert facts["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for norm, values in expected["norms"].items():
        assert facts["norms"][norm] == pytest.approx(values, rel=1e-5), norm
    state, reference = load_file(out / f"{name}.safetensors"), load_file(out / f"{like}.safetensors")
    assert state.keys() == reference.keys()
    far = {key: distance(state[key], reference[key]) for key in reference if has_meaning(key)}
    assert max(far.values()) < 1e-5, max(far, key=far.__getitem__)


@pytest.mark.parametrize("name", [c["name"] for c in EXACT if c["like"] == "skipping"])
def test_the_same_steps_are_skipped_as_by_plain_pytorch(out: Path, name: str) -> None:
    skipped = facts_of(out, name)["skipped"]
    assert skipped == facts_of(out, "skipping")["skipped"]
    assert 0 < sum(skipped[:6]) < 6
    assert 0 < sum(skipped[6:]) < STEPS - 6


def test_the_recipes_train_so_that_equality_means_something(out: Path) -> None:
    for name in RECIPES:
        state = load_file(out / f"{name}.safetensors")
        averages = [key for key in state if key.startswith("ema/")]
        assert not [key for key in averages if HEAD in key]
        moved = [distance(state[key], state[f"model/{key[4:]}"]) for key in averages]
        assert min(moved) > 1e-4, name  # the averages lag behind weights that have all moved


@pytest.mark.parametrize("name", [c["name"] for c in [*XLA, BF16[0]]])
def test_a_run_is_compiled_once_and_reads_nothing_back_between_log_steps(out: Path, name: str) -> None:
    facts = facts_of(out, name)
    # With micro-batches there are two programs: one for each of them, one for the update.
    compilations = 2 if "micro-batches" in name else 1
    assert facts["of_training"] == {"compilations": compilations, "reads": 0}
    assert facts["of_everything"]["compilations"] == compilations  # neither logging nor saving compiles
    assert facts["of_everything"]["reads"] > 0


@pytest.mark.parametrize("case", XLA, ids=lambda case: case["name"])
def test_after_training_every_tensor_still_lies_as_the_mode_and_the_table_say(out: Path, case: dict[str, Any]) -> None:
    mode, devices = case["settings"]["mode"], case["settings"]["cpu_devices"]
    shards = case["settings"].get("fsdp_devices", devices)
    like = Case("x", "xla", **RECIPES[case["like"]])
    table = sharding_of(like.with_head(like.model()), shards)
    spread_parts = {"replicated": set(), "zero1": {"ema", "optimizer"}, "fsdp": {"model", "ema", "optimizer"}}[mode]
    for name, found in facts_of(out, case["name"])["shardings"].items():
        part, _, rest = name.partition("/")
        parameter, _, quantity = rest.partition("/")
        axes = table[parameter]
        if part in spread_parts and any(axes) and quantity != "step" and shards > 1:
            dims = [shards if axis else 1 for axis in axes] + ([devices // shards] if shards < devices else [])
            assert re.search(r"devices=\[([\d,]+)\]", found).group(1) == ",".join(map(str, dims)), name  # type: ignore[union-attr]
        elif devices > 1:
            assert found == "{replicated}", name


def test_micro_batches_exchange_each_gradient_once_a_step(out: Path) -> None:
    case = Case("x", "accelerate", **RECIPES["adaln"])
    gradients = sum(parameter.numel() for parameter in case.with_head(case.model()).parameters())
    assert facts_of(out, "accelerate-2-micro-batches")["exchanged"] == STEPS * gradients


def test_fsdp_of_accelerate_spreads_weights_averages_and_moments(out: Path) -> None:
    shardings = facts_of(out, "accelerate-2-fsdp")["shardings"]
    assert {kind for name, kind in shardings.items() if not name.endswith("/step")} == {"DTensor"}


@pytest.mark.parametrize("case", BF16, ids=lambda case: case["name"])
def test_bf16_is_of_the_network_alone(out: Path, case: dict[str, Any]) -> None:
    losses, exact = facts_of(out, case["name"])["losses"], facts_of(out, case["like"])["losses"]
    assert losses == pytest.approx(exact, rel=5e-3)
    assert losses != pytest.approx(exact, rel=1e-6)
    state = load_file(out / f"{case['name']}.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
