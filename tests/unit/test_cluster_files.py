"""Task files of SkyPilot and manifests of Kubernetes fit their schemas, and their commands are ours."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fast_hydra
import jsonschema
import pytest
import yaml
from conftest import GOLDEN

from core.rooms import ROOT
from launch import ranks
from train.signals import EX_TEMPFAIL

SKY = sorted((ROOT / "launch/sky").glob("*.yaml"))
K8S = sorted((ROOT / "launch/k8s").glob("*.yaml"))

# It appends its words as a line of JSON, and ends as a run that was asked to stop.
DITSCALE = (
    '#!/bin/sh\npython3 -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@" >> "$HOME/calls"\nexit $CODE\n'
)
OF_SKYPILOT = {  # variables that it sets on the second of two nodes
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def _case_insensitive_enum(validator: Any, known: list[str], value: str, schema: Any) -> Iterator[Any]:
    if value.lower() not in [each.lower() for each in known]:
        yield jsonschema.ValidationError(f"{value!r} is not one of {known!r}")


SkyPilots = jsonschema.validators.extend(
    jsonschema.Draft7Validator, {"case_insensitive_enum": _case_insensitive_enum}
)  # which SkyPilot uses too


def check_task(task: dict[str, Any]) -> None:
    given = {name: "x" if value is None else value for name, value in task["envs"].items()}  # by --env
    SkyPilots(schema("sky_task.json")).validate({**task, "envs": given})


def check_manifest(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, schema("jobset.json"))


def schema(name: str) -> Any:
    return json.loads((GOLDEN / "cluster" / name).read_text())["schema"]


def called(home: Path, command: list[str], code: int, **variables: str) -> tuple[int, list[list[str]]]:
    """Run a script with a stand-in for ``ditscale`` that exits with ``code``; return the exit code and its calls."""
    program = home / "ditscale/bin/ditscale"  # where the task files install it
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(DITSCALE)
    program.chmod(0o755)
    (home / "calls").unlink(missing_ok=True)
    environment = {"HOME": str(home), "CODE": str(code), "PATH": f"{program.parent}:{os.environ['PATH']}", **variables}
    ended = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert ended.stderr == ""
    return ended.returncode, [json.loads(line) for line in (home / "calls").read_text().splitlines()]


def composes(words: list[str]) -> dict[str, str]:
    """Compose the config of a command, as its job would; return the settings of ``launch ranks``."""
    given = {}
    if words[0] == "launch":
        assert words[1] == "ranks"
        given, words = ranks._parsed(words[2:])
    job, *overrides = [word for word in words if word != "-m"]
    fast_hydra.composed(job, *overrides)
    return given


@pytest.mark.parametrize("path", SKY, ids=lambda path: path.name)
def test_a_task_file_fits_skypilots_schema_and_its_commands_compose(path: Path, tmp_path: Path) -> None:
    task = read(path)
    check_task(task)
    given = {"BUCKET": "my-bucket", "IMAGES": "gs://images/train"}
    variables = {name: value or given[name] for name, value in task["envs"].items()}
    code, calls = called(tmp_path, ["bash", "-uc", task["run"]], 0, **OF_SKYPILOT, **variables)
    assert code == 0
    assert [words[0] for words in calls] in (["launch"], ["train"], ["train", "report"])
    for words in calls:
        settings = composes(words)
        assert settings.get("processes") in (None, "8")
        if settings.get("nodes") == "2":
            assert (settings["node"], settings["address"]) == ("1", "10.0.0.1")
    for name in task["envs"]:
        assert re.search(rf"\$\{{?{name}\b", path.read_text()), name


@pytest.mark.parametrize("path", SKY, ids=lambda path: path.name)
def test_skypilot_sees_the_exit_code_of_a_stopped_run_and_starts_it_again(path: Path, tmp_path: Path) -> None:
    task = read(path)
    variables = {name: value or "x" for name, value in task["envs"].items()}
    code, calls = called(tmp_path, ["bash", "-uc", task["run"]], EX_TEMPFAIL, **OF_SKYPILOT, **variables)
    assert (code, len(calls)) == (EX_TEMPFAIL, 1)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [EX_TEMPFAIL]


@pytest.mark.parametrize("path", SKY, ids=lambda path: path.name)
def test_a_task_installs_a_python_that_this_package_takes(path: Path) -> None:
    setup = read(path)["setup"]
    assert "uv venv --quiet --allow-existing --python 3.11" in setup  # images of clouds still have 3.10
    (extras,) = re.findall(r"'\.\[(.*?)\]' -c constraints\.txt", setup)
    known = re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text(), flags=re.M)
    assert set(extras.split(",")) <= set(known)


def test_what_encoding_writes_is_what_training_and_the_sweep_read() -> None:
    texts = {path.stem: path.read_text() for path in SKY}
    assert "data.shards=/shards/imagenet256-$AUTOENCODER" in texts["encode"]
    of_recipe = {"train": "sd_vae_ema", "train_tpu": "sd_vae_ema", "sweep": "sd_vae_mse"}
    for name, autoencoder in of_recipe.items():
        assert f"data.shards=gs://$BUCKET/imagenet256-{autoencoder} " in texts[name]
        study = ["experiment=paper/scaling"] if name == "sweep" else ["data=imagenet256"]
        used = fast_hydra.composed("train", *study)["data"]["autoencoder"]["name"]
        assert used == autoencoder.replace("sd_vae_", "sd-vae-ft-")
    assert read(ROOT / "launch/sky/encode.yaml")["envs"]["AUTOENCODER"] == of_recipe["train"]


@pytest.mark.parametrize("path", [*SKY, *K8S], ids=lambda path: path.name)
def test_a_job_that_reads_shards_from_a_bucket_needs_no_more_than_its_cache_holds(path: Path) -> None:
    text = path.read_text()
    if "data.shards=gs://" in text:  # 45 GB, of which the global order needs all, and the cache holds 34 by default
        assert ("data/order=windowed" in text) != ("data.cache_bytes=64000000000" in text)


def test_there_is_a_task_file_for_each_job_and_machine() -> None:
    assert {path.stem for path in SKY} == {"encode", "train", "train_tpu", "sweep", "evaluate"}
    assert {path.stem for path in K8S} == {"gpus", "tpus"}


@pytest.mark.parametrize("path", K8S, ids=lambda path: path.name)
def test_a_manifest_fits_the_schema_and_its_command_composes(path: Path, tmp_path: Path) -> None:
    manifest = read(path)
    check_manifest(manifest)
    name = manifest["metadata"]["name"]
    [job] = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    [container] = spec["template"]["spec"]["containers"]
    command = [*container["command"], *container["args"]]
    code, [words] = called(tmp_path, command, EX_TEMPFAIL, JOB_COMPLETION_INDEX="1")
    assert code == EX_TEMPFAIL
    settings = composes(words)
    if settings:
        assert (settings["nodes"], settings["node"]) == (str(spec["completions"]), "1")
        assert settings["processes"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
        assert settings["address"] == f"{name}-{job['name']}-0-0.{name}"  # as JobSet names the first pod


def decided(manifest: dict[str, Any], code: int, evicted: bool) -> str:
    """Return the action that Kubernetes and JobSet take for a pod that ended, by the rules of their documentation."""
    [job] = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["backoffLimit"], spec["template"]["spec"]["restartPolicy"]) == (0, "Never")
    reason = "BackoffLimitExceeded"
    for rule in spec["podFailurePolicy"]["rules"]:
        by_code = "onExitCodes" in rule and code in rule["onExitCodes"]["values"]
        if by_code or (evicted and {"type": "DisruptionTarget", "status": "True"} in rule.get("onPodConditions", [])):
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
    rules = manifest["spec"]["failurePolicy"]["rules"]
    actions = [rule["action"] for rule in rules if reason in rule["onJobFailureReasons"]]
    return str(actions[0]) if actions else "RestartJobSet"  # which counts towards maxRestarts


@pytest.mark.parametrize("path", K8S, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("code", "evicted", "action"),
    [
        (EX_TEMPFAIL, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (EX_TEMPFAIL, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),  # it had not saved when the grace ended
        (137, False, "RestartJobSet"),
        (1, False, "RestartJobSet"),  # another host was lost, or the run diverged
        (2, False, "RestartJobSet"),
    ],
)
def test_a_stopped_or_evicted_run_restarts_without_limit_and_any_other_a_few_times(
    path: Path, code: int, evicted: bool, action: str
) -> None:
    manifest = read(path)
    assert decided(manifest, code, evicted) == action
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 5


@pytest.mark.parametrize(
    "spoil",
    [
        lambda task: task["resources"]["job_recovery"].update(recover_on_exit_codes=["75"]),
        lambda task: task["resources"]["job_recovery"].update(recover_on_exit_code=[75]),
        lambda task: task["resources"].update(use_spots=True),
        lambda task: task["resources"].update(cloud="my-cloud"),
        lambda task: task["file_mounts"]["/runs"].update(mode="MOUNTED"),
        lambda task: task["envs"].update({"A-B": "x"}),
    ],
)
def test_a_wrong_field_of_a_task_does_not_fit(spoil: Callable[[Any], None]) -> None:
    task = read(ROOT / "launch/sky/sweep.yaml")
    check_task(task)
    spoil(task)
    with pytest.raises(jsonschema.ValidationError):
        check_task(task)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["podFailurePolicy"]["rules"][0].update(onExitCode={}),
        lambda job: job["podFailurePolicy"]["rules"][0]["onExitCodes"].pop("operator"),
        lambda job: job.update(backOffLimit=0),
        lambda job: job["template"]["spec"].update(terminationGracePeriodSeconds="120"),
        lambda job: job["template"]["spec"]["containers"][0].update(volumeMount=[]),
    ],
)
def test_a_wrong_field_of_a_manifest_does_not_fit(spoil: Callable[[Any], None]) -> None:
    manifest = read(ROOT / "launch/k8s/gpus.yaml")
    check_manifest(manifest)
    spoil(manifest["spec"]["replicatedJobs"][0]["template"]["spec"])
    with pytest.raises(jsonschema.ValidationError):
        check_manifest(manifest)
