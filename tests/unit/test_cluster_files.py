"""Task files of SkyPilot and manifests of Kubernetes fit their schemas, and their commands are ours."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import fast_hydra
import jsonschema
import pytest
import yaml
from conftest import GOLDEN

from core.rooms import ROOT
from launch import ranks

SKY = sorted((ROOT / "launch/sky").glob("*.yaml"))
K8S = sorted((ROOT / "launch/k8s").glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def schema(name: str) -> Any:
    return json.loads((GOLDEN / "cluster" / name).read_text())["schema"]


def commands(script: str) -> list[list[str]]:
    """Return the ``ditscale`` commands of a script, with a number for each variable and substitution."""
    plain = re.sub(r"node=\$\w+", "node=0", script)
    plain = re.sub(r"\$\(.*?\)|\$\{?\w+\}?", "1", plain)
    lines = [line.strip().removeprefix("exec ") for line in plain.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("ditscale ")]


def composes(words: list[str]) -> None:
    """Compose the config of a command, as its job would."""
    if words[0] == "launch":
        assert words[1] == "ranks"
        ranks._parsed(words[2:])
        words = words[words.index("--") + 1 :]
    job, *overrides = [word for word in words if word != "-m"]
    fast_hydra.composed(job, *overrides)


@pytest.mark.parametrize("path", SKY, ids=lambda path: path.name)
def test_a_task_file_fits_skypilots_schema_and_starts_a_stopped_run_again(path: Path) -> None:
    task = read(path)
    needed = {name: "x" if value is None else value for name, value in task["envs"].items()}  # given by --env
    jsonschema.validate({**task, "envs": needed}, schema("sky_task.json"))
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    found = commands(task["run"])
    assert found
    for words in found:
        composes(words)
    for name in needed:
        assert re.search(rf"\$\{{?{name}\b", path.read_text()), name


def test_there_is_a_task_file_for_each_job_and_machine() -> None:
    assert {path.stem for path in SKY} == {"encode", "train", "train_tpu", "sweep", "evaluate"}
    assert {path.stem for path in K8S} == {"gpus", "tpus"}


@pytest.mark.parametrize("path", K8S, ids=lambda path: path.name)
def test_a_manifest_fits_the_schema_and_restarts_what_was_stopped(path: Path) -> None:
    manifest = read(path)
    jsonschema.validate(manifest, schema("jobset.json"))
    [job] = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    [rule] = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == (
        "FailJob",
        [1, 2],
    )  # 75 is not among them
    [restart] = manifest["spec"]["failurePolicy"]["rules"]
    assert (restart["action"], restart["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    [container] = spec["template"]["spec"]["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    [words] = commands("\n".join(container["args"]))
    composes(words)


def test_a_wrong_field_does_not_fit() -> None:
    task = read(ROOT / "launch/sky/train.yaml")
    task["envs"] = {}
    task["resources"]["job_recovery"]["recover_on_exit_codes"] = ["75"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task, schema("sky_task.json"))
    manifest = read(ROOT / "launch/k8s/gpus.yaml")
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCode"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema("jobset.json"))
