"""The rules of the project hold: rooms import only the rooms they may, and every config builds something."""

import ast
import configparser
import copy
import functools
import itertools
import json
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import fast_hydra
import pytest
from omegaconf import OmegaConf

from core.rooms import MAY_IMPORT, ROOT, source_files
from launch.command.app import CONF
from launch.command.check import check_targets
from launch.jobs import JOBS

FILES = source_files(*MAY_IMPORT)
MODEL = source_files("model")
LAUNCH = {path.relative_to(ROOT).as_posix() for path in source_files("launch")}
PROGRAMS = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py"))]


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imports_of(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_between_rooms_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert imports_of(path) & set(MAY_IMPORT) <= MAY_IMPORT[room] | {room}


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("hydra", {path.relative_to(ROOT).as_posix() for path in FILES if "launch" in path.relative_to(ROOT).parts}),
        (
            "omegaconf",
            {path.relative_to(ROOT).as_posix() for path in FILES if "launch" in path.relative_to(ROOT).parts},
        ),
        ("pickle", {"evaluation/features/inception.py"}),  # for the name of an exception
        ("huggingface_hub", {"launch/builders/hub.py"}),
        ("gradio", {"launch/page/fields.py", "launch/page/page.py"}),
    ],
)
def test_a_package_is_imported_in_its_home_only(package: str, homes: set[str]) -> None:
    found = {path.relative_to(ROOT).as_posix() for path in FILES if package in imports_of(path)}
    assert found <= homes


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("accelerate", {"runtime/accelerate_devices.py"}),
        ("torch_xla", {f"runtime/{name}.py" for name in ("xla", "xla_devices", "xla_layers", "lowering")}),
        ("torch.distributed", {"runtime/accelerate.py", "runtime/hosts.py"}),
    ],
)
def test_what_knows_of_machines_is_imported_in_the_runtime_room_only(package: str, homes: set[str]) -> None:
    found = {path.relative_to(ROOT).as_posix() for path in PROGRAMS if imports(path, package)}
    assert found == homes


def imports(path: Path, package: str) -> bool:
    """Return whether a file imports a package or a part of it, in any form, or calls it by its full name."""
    chains = (node for node in nodes_of(path) if isinstance(node, ast.Name | ast.Attribute))
    named = {package} & {ast.unparse(node) for node in chains}
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return any(name == package or name.startswith(f"{package}.") for name in named)


@pytest.mark.parametrize("name", ["train/loop.py", "train/step.py", "train/hooks.py", "launch/train.py"])
def test_the_loop_and_what_it_calls_do_not_ask_which_runtime_it_is(name: str) -> None:
    asked = r"\b(xla|tpu|accelerate|cuda|gloo|isinstance\(runtime|type\(runtime)\b"
    assert not re.findall(asked, (ROOT / name).read_text().lower())


def test_the_model_room_imports_nothing_that_knows_of_machines() -> None:
    used = {path.name: imports_of(path) - set(sys.stdlib_module_names) - {"model", "core"} for path in MODEL}
    for name in ("diffusers_weights.py", "autoencoder_folder.py", "unet.py", "adm.py", "ldm.py", "sd_diffusers.py"):
        assert used.pop(name) == {"torch", "diffusers"}
    assert set().union(*used.values()) == {"torch"}
    of_core = {name for path in MODEL for name in re.findall(r"from (core\.\w+)", path.read_text())}
    assert of_core == {"core.precision", "core.latents", "core.samples"}
    assert imports_of(ROOT / "core/precision.py") - set(sys.stdlib_module_names) == {"torch"}


WITHOUT_NETWORKS = [
    path for path in FILES if path.relative_to(ROOT).parts[0] in ("train", "runtime", "evaluation", "report", "launch")
]


@pytest.mark.parametrize("path", WITHOUT_NETWORKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_but_the_models_knows_a_network_by_more_than_its_interface(path: Path) -> None:
    nodes = nodes_of(path)
    assert not {node.attr for node in nodes if isinstance(node, ast.Attribute)} & {
        "blocks",
        "block_list",
        "learn_sigma",
    }
    assert not {node.id for node in nodes if isinstance(node, ast.Name)} & {"DiT", "DiTConfig"}
    inside = ("dit", "blocks", "attention", "embeddings", "final_layers", "mlp", "norms")
    assert not [name for name in inside if imports(path, f"model.{name}")]


def composed(job: str, *overrides: str) -> dict[str, Any]:
    """Return a job's config as its readers get it."""
    return copy.deepcopy(_composed(job, *overrides))


@functools.cache
def _composed(job: str, *overrides: str) -> dict[str, Any]:
    config = fast_hydra.composed(job, *overrides)
    return OmegaConf.to_container(config, resolve=True, enum_to_str=True)  # type: ignore[return-value]


def override_of(path: Path) -> str:
    """Return the command line's name of a config file; whole studies are one group with folders."""
    relative = path.relative_to(CONF).with_suffix("")
    group = Path("experiment") if relative.parts[0] == "experiment" else relative.parent
    return f"{group}={relative.relative_to(group)}"


GROUPS = sorted(override_of(path) for path in CONF.rglob("*.yaml") if len(path.relative_to(CONF).parts) > 1)


# Groups of which a choice decides what others there are: each choice is composed alone.
DECISIVE = {"experiment", "data", "data/encoding", "diffusion", "evaluation", "evaluation/image_set", "model"}
DECISIVE |= {"data/teacher", "data/captions", "data/text_encoder", "diffusion/path", "diffusion/times"}


def combined(overrides: list[str]) -> list[list[str]]:
    """Return all overrides in few command lines, each of which has one choice of a group at most."""
    alone = [override for override in overrides if override.split("=")[0] in DECISIVE]
    others = [override for override in overrides if override not in alone]
    groups = [list(choices) for _, choices in itertools.groupby(others, lambda override: override.split("=")[0])]
    together = [[choice for choice in line if choice] for line in itertools.zip_longest(*groups)]
    return [*together, *([override] for override in alone)]


@pytest.mark.parametrize("overrides", combined(GROUPS), ids=" ".join)
def test_every_config_file_builds_what_exists_with_settings_that_it_has(overrides: list[str]) -> None:
    more = ["guidance.guide=x"] if any(override.endswith("autoguidance") for override in overrides) else []
    more += ["data.name=x"] if overrides == ["data=folder"] else []
    # Groups that training has not.
    homes = {f"data/{group}": "encode" for group in ("encoding", "teacher", "captions", "text_encoder")}
    homes["evaluation/image_set"] = "reference"
    job = next((job for group, job in homes.items() if overrides[0].startswith(group)), "train")
    more += ["diffusion=flow"] if overrides[0].startswith(("diffusion/path=", "diffusion/times=")) else []
    given = [f"+{o}" if o.startswith("model/embedding=") else o for o in overrides]  # a group without a default
    check_targets(composed(job, *given, *more))


@pytest.mark.parametrize("job", ["train", "plan"])
def test_the_tests_compose_what_hydra_composes_by_itself(job: str) -> None:
    overrides = ["model/block=in_context", "diffusion/sampler=ddim"] if job == "train" else ["model.depth=3"]
    more = [["experiment=demo/study", "train/ema=several"]] if job == "train" else []
    for words in (overrides, *more):
        here, again = (_composed.__wrapped__(job, *words) for _ in range(2))
        fast_hydra.remove()
        try:
            alone = _composed.__wrapped__(job, *words)
        finally:
            fast_hydra.install()
        assert json.dumps(here) == json.dumps(again) == json.dumps(alone)  # in the same order


@pytest.mark.parametrize("job", JOBS)
def test_every_job_composes(job: str) -> None:
    check_targets(composed(job))


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_its_function_and_a_module_that_starts_it(job: str) -> None:
    assert callable(pkgutil.resolve_name(f"launch.{job}:{job}_job"))
    settle = JOBS[job].settle
    assert settle is None or callable(pkgutil.resolve_name(settle))
    assert (ROOT / f"launch/{job}.py").read_text().endswith(f'if __name__ == "__main__":\n    start("{job}")\n')


@pytest.mark.parametrize("job", ["train", "plan"])
def test_a_networks_section_holds_what_its_own_config_says_and_no_part_of_a_dit(job: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/other.yaml").write_text("_target_: model.other.Other\nlayers: 3\n")
    found = composed(job, f"hydra.searchpath=[file://{tmp_path}]", "model=other")["model"]
    assert found == {"_target_": "model.other.Other", "layers": 3}


def test_a_config_group_lies_under_the_room_of_what_it_builds() -> None:
    for path in CONF.rglob("*.yaml"):
        target = OmegaConf.load(path).get("_target_", "")
        if path.parent == CONF or not target or target.startswith("torch."):
            continue
        room = path.relative_to(CONF).parts[0]
        assert target.split(".")[0] == room, path


def test_the_defaults_are_the_papers_recipe() -> None:
    config = composed("train")
    assert (config["batch_size"], config["total_steps"], config["class_dropout"]) == (256, 400_000, 0.1)
    optimizer = config["optimizer"]
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (1e-4, [0.9, 0.999], 0.0)
    assert config["ema"]["decay"] == 0.9999
    assert config["sampler"]["steps"] == 250
    assert config["diffusion"]["schedule"]["num_steps"] == 1000


@pytest.mark.parametrize("experiment", ["demo", "demo/scaling"])
@pytest.mark.parametrize("name", ["several", "power", "warmed_up"])
def test_an_experiments_average_is_replaced_whole(experiment: str, name: str) -> None:
    """Check that no decay of a short run remains where another kind of average is selected."""
    alone = composed("train", f"train/ema={name}")["ema"]
    assert composed("train", f"experiment={experiment}", f"train/ema={name}")["ema"] == alone
    assert composed("train", f"experiment={experiment}")["ema"]["decay"] < 0.9999


def test_packaging_types_and_docs_list_the_rooms_that_there_are() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    rooms = list(MAY_IMPORT)
    assert settings["options.packages.find"]["include"].replace("*", "").split(", ") == rooms
    assert settings["mypy"]["files"].split(", ") == rooms
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"} == set(rooms)
    table = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    for room, allowed in MAY_IMPORT.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| `{room}/` |"))
        named = row.rsplit("|", 2)[1]
        assert set(re.findall(r"`(\w+)`", named)) == allowed, row
