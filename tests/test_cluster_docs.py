"""The job files of docs/cluster.md: that they are what Slurm, KubeRay, SkyPilot and Ray take.

Slurm itself is not here: `srun` and `ray` are stubs, of which the latter opens a port.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCS = Path(__file__).parents[1] / "docs" / "cluster.md"
BLOCKS = re.findall(r"```(bash|yaml)\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
SLURM = next(block for kind, block in BLOCKS if kind == "bash" and "#SBATCH" in block)
KUBERAY, SKYPILOT = (yaml.safe_load(block) for kind, block in BLOCKS if kind == "yaml")
PATIENCE_S = 60.0

SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do options+=("$1"); shift; done
echo "srun ${options[*]} | $* | cores $SRUN_CPUS_PER_TASK token ${#RAY_AUTH_TOKEN}" >> "$SAID"
exec "$@"
"""
RAY = f"""#!{sys.executable}
import os, socket, sys, time
if "--head" in sys.argv and not os.environ.get("NO_HEAD"):
    with socket.create_server(("127.0.0.1", int(os.environ["FREE_PORT"]))):
        time.sleep({PATIENCE_S})
"""
SENSEBATCH = """#!/bin/bash
echo "sensebatch $*" >> "$SAID"
trap 'sleep 0.2; exit 75' TERM
if [ -n "$FOREVER" ]; then while true; do sleep 0.05; done; fi
exit 1
"""


class Job:
    """The script of the documentation as Slurm would run it."""

    script = SLURM

    def __init__(self, folder: Path, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port: int = server.getsockname()[1]
        port = str(self.port)
        for name, text in {"srun": SRUN, "ray": RAY, "sensebatch": SENSEBATCH}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        script = folder / "job.sh"
        script.write_text(self.script.replace("port=6379", f"port={port}"))
        self._said = folder / "said"
        self._process = subprocess.Popen(
            ["bash", script],
            env={
                **os.environ,
                "PATH": f"{folder}:{os.environ['PATH']}",
                "SAID": str(self._said),
                "FREE_PORT": port,
                "SLURMD_NODENAME": "localhost",
                "SLURM_NNODES": "4",
                "SLURM_CPUS_PER_TASK": "32",
                **environment,
            },
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_for(self, word: str) -> None:
        """Returns once a word was said."""
        end = time.monotonic() + PATIENCE_S
        while not self._said.exists() or word not in self._said.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)

    def stop(self) -> None:
        """Sends what Slurm sends before the time is over: to the shell alone."""
        self._process.send_signal(signal.SIGTERM)

    def is_alone_after_it(self) -> bool:
        """Returns whether nothing listens at the port any more soon after the script has ended."""
        self._process.wait(PATIENCE_S)
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except ConnectionRefusedError:
                return True
            time.sleep(0.05)
        return False

    def end(self) -> tuple[int, list[str]]:
        """Returns the exit code of the script, and what was run."""
        code = self._process.wait(PATIENCE_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        said = self._said.read_text().splitlines() if self._said.exists() else []
        return code, said


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bash") is None or shutil.which("openssl") is None,
    reason="needs bash, its /dev/tcp, and openssl",
)


def test_slurm_starts_ray_on_every_node_and_exits_as_the_run_does(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.wait_for("sensebatch run")
    job.wait_for("--address=")
    code, said = job.end()
    assert code == 1
    head, others = (next(line for line in said if word in line) for word in ("--head", "--exclude"))
    run = next(line for line in said if line.startswith("sensebatch"))
    assert head.startswith("srun --overlap --nodes=1 --ntasks=1 --nodelist=localhost | ray start")
    assert others.startswith("srun --overlap --nodes=3 --ntasks=3 --exclude=localhost | ray start")
    assert all(line.endswith("cores 32 token 64") for line in (head, others))
    address = re.search(r"--address=(\S+)", others)
    assert address is not None
    assert f"--cluster {address[1]} " in run


def test_slurm_lets_a_run_end_in_order_when_the_time_is_over(tmp_path: Path) -> None:
    job = Job(tmp_path, FOREVER="1")
    job.wait_for("sensebatch run")
    job.stop()
    assert job.end()[0] == 75


def test_slurm_does_not_wait_for_a_head_that_did_not_start(tmp_path: Path) -> None:
    code, said = Job(tmp_path, NO_HEAD="1").end()
    assert code == 1
    assert not any(line.startswith("sensebatch") for line in said)


def test_skypilot_ends_ray_with_the_run_and_with_its_code(tmp_path: Path) -> None:
    class Sky(Job):
        script = SKYPILOT["run"].replace("6379", "$FREE_PORT")

    nodes = "127.0.0.1\n127.0.0.2"
    job = Sky(tmp_path, SKYPILOT_NODE_IPS=nodes, SKYPILOT_NODE_RANK="0")
    assert job.is_alone_after_it()
    code, said = job.end()
    assert code == 1
    assert [line.split(" --cluster")[0] for line in said] == ["sensebatch run m.yaml"]


@pytest.mark.parametrize("script", [SLURM, SKYPILOT["run"], SKYPILOT["setup"]])
def test_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_options_of_ray_are_those_it_has() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    known = {name for option in scripts.start.params for name in option.opts}
    typed = re.findall(r"ray start ([^\n]*)", SLURM.replace("\\\n", "") + SKYPILOT["run"])
    asked = {word.split("=")[0] for line in typed for word in line.split() if word[:2] == "--"}
    groups = [KUBERAY["spec"]["headGroupSpec"], *KUBERAY["spec"]["workerGroupSpecs"]]
    asked |= {f"--{name}" for group in groups for name in group["rayStartParams"]}
    assert {"--head", "--address", "--block", "--num-gpus"} <= asked <= known


def pod(group: dict[str, Any]) -> dict[str, Any]:
    """Returns what a group's pods are made of."""
    found: dict[str, Any] = group["template"]["spec"]
    return found


def test_fields_of_kuberay_and_skypilot_are_those_of_their_references() -> None:
    spec = KUBERAY["spec"]
    assert (KUBERAY["apiVersion"], KUBERAY["kind"]) == ("ray.io/v1", "RayCluster")
    assert set(spec) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert isinstance(spec["rayVersion"], str)
    (workers,) = spec["workerGroupSpecs"]
    numbers = {"replicas", "minReplicas", "maxReplicas"}
    assert set(workers) == {"groupName", "rayStartParams", "template", *numbers}
    for group in (spec["headGroupSpec"], workers):
        volumes = {volume["name"] for volume in pod(group)["volumes"]}
        (container,) = pod(group)["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert set(SKYPILOT) == {"num_nodes", "resources", "envs", "secrets", "setup", "run"}
    assert SKYPILOT["secrets"] == {"RAY_AUTH_TOKEN": None}
    assert "6380" not in SKYPILOT["run"], "SkyPilot's own Ray has that port"
