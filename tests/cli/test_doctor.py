"""`sensebatch doctor`: what is measured is said and kept."""

from __future__ import annotations

import json
import pwd
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sensebatch import loading
from sensebatch.cli import verification
from sensebatch.cli.speed_cache import read_speeds, speeds_path
from sensebatch.engine.device import machine
from sensebatch.engine.device.machine import Gpu, Machine
from sensebatch.jobs import Stored
from sensebatch.plan.attention import AttentionSpeeds
from sensebatch.verify.promises import TRIALS
from tests.backends import FakeBackend
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.slow

GPU = Gpu(
    name="NVIDIA Test",
    free_bytes=20 << 30,
    total_bytes=24 << 30,
    pinned_bytes_per_s=25e9,
    pageable_bytes_per_s=6e9,
    gemm_flop_per_s=150e12,
    attention_flop_per_s=120e12,
    memory_bytes_per_s=9e11,
    quantised_flop_per_s={Stored.INT8: 300e12},
    attention_backends={"cudnn": {1024: 9e13, 4096: 12e13}, "sdpa": {1024: 8e13}},
)

MACHINE = Machine(
    sensebatch="0",
    python="3.11",
    torch="2.11.0",
    cuda="13.0",
    flash_obstacle=None,
    kernels_obstacle=None,
    fp8_obstacle="fp8 needs another GPU",
    int8_obstacle=None,
    host_free_bytes=1 << 34,
    host_total_bytes=1 << 35,
    gpu=GPU,
)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU."""
    monkeypatch.setattr(machine, "look_at_machine", lambda: MACHINE)


@pytest.mark.usefixtures("with_gpu")
def test_speeds_are_kept_and_where_is_said(invoke: Invoke, tmp_path: Path) -> None:
    printed = invoke("doctor").out
    kept = tmp_path / "cache" / "speeds.json"
    assert f"speeds kept in  {kept}" in printed
    assert "matrix product  150 TFLOP/s in bfloat16, 300 in int8" in printed
    assert "attention       120 TFLOP/s" in printed
    assert "memory reads    838 GiB/s" in printed
    assert "float8          not usable: fp8 needs another GPU\nint8            usable" in printed
    speeds, mistake = read_speeds()
    assert mistake is None
    assert speeds is not None
    assert (speeds.gpu, speeds.torch, speeds.free_bytes) == (GPU.name, "2.11.0", GPU.free_bytes)
    assert speeds.machine.speeds.copy_bytes_per_s == GPU.pinned_bytes_per_s
    assert speeds.machine.speeds.attention_flop_per_s == GPU.attention_flop_per_s
    assert speeds.machine.speeds.quantised_flop_per_s == {Stored.INT8: 300e12}
    assert "  cudnn         90 TFLOP/s for 1,024 tokens, 120 TFLOP/s for 4,096 tokens" in printed
    assert speeds.attention_speeds == AttentionSpeeds(
        gpu=GPU.name, torch="2.11.0", flop_per_s=GPU.attention_backends
    )
    assert speeds.machine.attention == speeds.attention_speeds


@pytest.mark.usefixtures("with_gpu")
def test_speeds_of_an_earlier_version_have_no_backends(invoke: Invoke) -> None:
    invoke("doctor")
    values = json.loads(speeds_path().read_text())
    del values["attention"]
    speeds_path().write_text(json.dumps(values))
    speeds, mistake = read_speeds()
    assert speeds is not None
    assert (speeds.attention_speeds, mistake) == (None, None)


@pytest.mark.usefixtures("with_gpu")
def test_json_has_every_speed_and_the_file(invoke: Invoke, tmp_path: Path) -> None:
    found = invoke("doctor", "--json").json
    assert found["gpu"]["memory_bytes_per_s"] == GPU.memory_bytes_per_s
    assert found["speeds_file"] == str(tmp_path / "cache" / "speeds.json")


@pytest.mark.usefixtures("with_gpu")
def test_plan_uses_what_doctor_kept(invoke: Invoke, manifest: Path) -> None:
    invoke("doctor")
    plan = invoke("plan", manifest, "--json").json
    assert plan["machine"]["gpu"] == GPU.name
    assert plan["memory"][0]["seconds"]["images"] > 0


@pytest.mark.usefixtures("with_gpu")
def test_run_knows_what_doctor_kept(
    invoke: Invoke, manifest: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[AttentionSpeeds | None] = []

    def new_backend(speeds: AttentionSpeeds | None) -> FakeBackend:
        given.append(speeds)
        return backend

    monkeypatch.setattr(loading, "TorchBackend", new_backend)
    invoke("run", manifest)
    invoke("doctor")
    invoke("run", manifest)
    before, after = given
    assert before is None
    assert after is not None
    assert after.flop_per_s == GPU.attention_backends


@pytest.mark.usefixtures("with_gpu")
def test_speeds_that_cannot_be_kept_are_still_printed(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    ended = invoke("doctor", "--json")
    assert ended.code == 0
    assert ended.json["speeds_file"] is None
    assert "not kept for sensebatch plan" in ended.err


def test_without_a_gpu_nothing_is_kept(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    kept = tmp_path / "cache" / "speeds.json"
    kept.parent.mkdir()
    kept.write_text("of another machine that shares the folder")
    assert invoke("doctor", "--json").json["speeds_file"] is None
    assert kept.read_text() == "of another machine that shares the folder"


def test_speeds_are_kept_among_the_caches_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SENSEBATCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert speeds_path() == tmp_path / "sensebatch" / "speeds.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert speeds_path() == tmp_path / ".cache" / "sensebatch" / "speeds.json"
    monkeypatch.setenv("SENSEBATCH_CACHE", str(tmp_path / "own"))
    assert speeds_path() == tmp_path / "own" / "speeds.json"


@pytest.mark.parametrize(
    ("cache", "said"),
    [("~nobody-at-all/x", "SENSEBATCH_CACHE=~nobody-at-all/x"), (None, "no HOME and no SENSE")],
)
@pytest.mark.usefixtures("backend", "with_gpu")
def test_a_user_without_a_home_has_no_speeds_and_all_else(
    invoke: Invoke,
    manifest: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: str | None,
    said: str,
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "SENSEBATCH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    # As pwd has it for a user id without an entry.
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    if cache is not None:
        monkeypatch.setenv("SENSEBATCH_CACHE", cache)
    assert invoke("run", manifest).code == 0
    planned = invoke("plan", manifest, "--json")
    assert (planned.code, planned.json["machine"]) == (0, None)
    assert f"speeds: expected a folder to keep them in, found {said}" in planned.err
    ended = invoke("doctor", "--json")
    assert (ended.code, ended.json["speeds_file"]) == (0, None)
    assert said in ended.err


@pytest.mark.usefixtures("with_gpu")
def test_a_speed_of_nothing_is_no_speed(invoke: Invoke) -> None:
    invoke("doctor")
    path = speeds_path()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_flop_per_s": 0}))
    speeds, mistake = read_speeds()
    assert speeds is None
    assert mistake is not None
    assert mistake.startswith(f"{path}: attention_flop_per_s: ")


@pytest.mark.slow
def test_promises_hold_on_this_machine(invoke: Invoke) -> None:
    """A CPU or a GPU: every task, killed and resumed, and with a LoRA, with the tiny model."""
    chosen = ("--only", "killed", "--only", "lora-balanced")
    ended = invoke("doctor", "--verify", "--model", "tiny", "--side", "128", *chosen)
    assert ended.code == 0, ended.err
    table = Path("outputs/verify/promises.md").read_text()
    assert ended.out == table
    assert table.count("| equal | equal | equal | equal | equal | - |") == 2
    assert [path.name for path in sorted(Path("outputs/verify").iterdir()) if path.is_dir()] == [
        *("full", "killed", "lora", "lora-balanced"),
    ]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """What was to be run; every run ends with a mistake."""
    calls: list[Sequence[str]] = []

    def launch(_module: str, arguments: Sequence[str], *_: object, **__: object) -> int:
        calls.append(arguments)
        return 2

    monkeypatch.setattr(verification, "launch", launch)
    return calls


def test_a_promise_that_cannot_be_checked_is_no_success(
    invoke: Invoke, children: list[Sequence[str]]
) -> None:
    ended = invoke("doctor", "--verify", "--json", "--only", "low", "--model", "tiny")
    assert ended.code == 1
    assert [call[2] for call in children] == ["run"]
    full, low = ended.json
    assert (full["run"], full["holds"], full["error"]) == ("full", False, FAILED)
    assert (low["run"], low["skipped"]) == ("low", "full failed")


FAILED = "exit code 2: it said nothing"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "low"], "expected --verify beside them"),
        (["--verify", "--only", "fats"], "--only: expected one of full, again"),
        (["--verify", "--side", "130"], "--side: expected"),
        (["--verify", "--model", "./none"], "./none: expected"),
        (["--verify", "--output-dir", "there"], "--output-dir: expected a new folder"),
    ],
)
def test_mistakes_are_reported_before_anything_is_run(
    invoke: Invoke, children: list[Sequence[str]], args: list[str], message: str
) -> None:
    Path("there").mkdir()
    ended = invoke("doctor", *args)
    assert ended.code == 2
    assert message in ended.err
    assert children == []


@pytest.mark.usefixtures("backend")
def test_every_run_of_a_gpu_is_a_command_that_can_be_run(
    invoke: Invoke, children: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(MACHINE, fp8_obstacle=None, gpu=replace(GPU, free_bytes=130 << 30))
    monkeypatch.setattr(machine, "look_at_machine", lambda: gpu)

    def launch(_module: str, arguments: Sequence[str], *_: object, **__: object) -> int:
        children.append(arguments)
        return 0 if arguments[1] == "-" else -signal.SIGKILL

    monkeypatch.setattr(verification, "launch", launch)
    invoke("doctor", "--verify", "--side", "128")
    commands = {tuple(words[2:]) for words in children}
    assert len(commands) == len(TRIALS)
    for command in commands:
        assert invoke(*command).code == 0
