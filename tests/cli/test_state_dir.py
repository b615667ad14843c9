"""`--state-dir`, and what is said of a folder on a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sensebatch.store import file_systems
from tests.backends import FakeBackend
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(autouse=True)
def _network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mounts"
    table.write_text(
        f"/dev/sda1 / ext4 rw 0 0\nserver:/x {tmp_path.resolve()}/nfs nfs4 rw 0 0\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(file_systems, "MOUNTS", table)


def test_a_folder_on_a_network_is_warned_of_with_what_to_do(invoke: Invoke, manifest: Path) -> None:
    ended = invoke("run", manifest, "--output-dir", "nfs/run")
    assert ended.code == 0
    assert "nfs/run/state.db is on nfs4 (" in ended.err
    assert "--state-dir keeps it on a disk of this machine" in ended.err
    ended = invoke("run", manifest, "--output-dir", "run")
    assert "nfs4" not in ended.err


def test_a_state_elsewhere_is_found_by_every_command(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    run = ("run", manifest, "--output-dir", "nfs/run")
    ended = invoke(*run, "--limit", "2", "--state-dir", "local")
    assert (ended.code, "nfs4" in ended.err) == (0, False)
    assert invoke(*run).code == 0
    assert len(backend.loaded) == 2
    (state,) = Path("local").glob("run-*/state.db")
    values = invoke("status", "nfs/run", "--json").json
    assert (values["done"], values["state"]) == (5, str(state.resolve()))
    said = invoke("status", "nfs/run", "--verify").out.split()
    # A long path has lines of its own.
    assert said[said.index("state") + 1 :][:2] == [str(state.resolve()), "on"]
    shutil.rmtree("local")
    ended = invoke("status", "nfs/run")
    assert (ended.code, "sensebatch repair nfs/run --state-dir DIR" in ended.err) == (2, True)
    assert invoke("repair", "nfs/run", "--state-dir", "local").code == 0
    assert "nothing was left to run" in invoke(*run).err
    ended = invoke(*run, "--state-dir", "nfs/state")
    assert ended.code == 2
    assert "--state-dir: expected a folder on a disk of this machine" in ended.err
