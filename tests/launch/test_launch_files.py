"""The files of `launch/`: each starts the task that its engine means, and its engine's own tools accept it.

A small program stands in for `jaxscape`, and writes down its arguments. The tools are not among the packages of the
other tests: `.ci/engines` installs them.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets the arguments of `jaxscape`, which is a stand-in here."""
    program, arguments = tmp_path / "jaxscape", tmp_path / "arguments"
    program.write_text(f'#!/bin/sh\necho "$@" > {arguments}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return arguments


def jobset() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def job() -> dict[str, Any]:
    """The Job that the JobSet makes."""
    (replicated,) = jobset()["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **replicated["template"]}


def container() -> dict[str, Any]:
    (container,) = job()["spec"]["template"]["spec"]["containers"]
    return container


def test_a_skypilot_job_runs_the_task_of_its_rank(started: Path) -> None:
    settings = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    environment = os.environ | {"OUT": "s3://bucket/name", "SKYPILOT_JOB_RANK": "2", "HOME": "/home/me"}
    subprocess.run(["bash", "-c", settings["run"]], env=environment, check=True)
    assert started.read_text() == "sweep /home/me/sweep.yaml --out s3://bucket/name --run 3\n"


def test_a_jobset_runs_the_task_of_its_name(started: Path) -> None:
    (name,) = (variable for variable in container()["env"] if variable["name"] == "NAME")
    assert name["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['jobset.sigs.k8s.io/jobset-name']"
    subprocess.run(container()["command"], env=os.environ | {"NAME": "my-sweep-12"}, check=True)
    assert started.read_text() == "sweep /sweep/sweep.yaml --run 12\n"


def test_the_command_of_the_jobset_gives_each_task_its_name() -> None:
    (command,) = (
        line for line in (LAUNCH / "jobset.yaml").read_text().splitlines() if line.startswith("#         sed")
    )
    made = subprocess.run(
        ["bash", "-c", command.lstrip("# ").partition(" | ")[0]],
        env=os.environ | {"task": "12"},
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
    )
    assert yaml.safe_load(made.stdout) == jobset() | {"metadata": {"name": "sweep-12"}}


def test_a_pod_that_was_told_to_stop_starts_again_and_no_other_failure_does() -> None:
    told, lost = job()["spec"]["podFailurePolicy"]["rules"]
    assert told == {
        "action": "Ignore",
        "onExitCodes": {"containerName": container()["name"], "operator": "In", "values": [75]},
    }
    assert lost == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert job()["spec"]["backoffLimit"] == 0


def test_skypilot_accepts_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sky = pytest.importorskip("sky", reason="needs skypilot")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").touch()
    settings = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    task = sky.Task.from_yaml_config(settings, env_overrides=[("OUT", "s3://bucket/name")])
    for resources in task.resources:
        assert resources.use_spot
        assert resources.job_recovery["recover_on_exit_codes"] == [75]


def test_jobset_and_kubernetes_accept_the_jobset() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api")
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    assert models.JobsetV1alpha2JobSet.from_dict(jobset()).to_dict() == jobset()  # it leaves out what it does not know
    validate.validate(job(), "1.33", strict=True)


@pytest.mark.parametrize(("tool", "file"), [("hadolint", "Dockerfile"), ("shellcheck", "slurm.sbatch")])
def test_linters_accept_the_file(tool: str, file: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")
    subprocess.run([tool, LAUNCH / file], check=True)
