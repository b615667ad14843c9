"""`sensebatch run --shard` and `sensebatch merge`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.backends import FakeBackend
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.usefixtures("backend")


def files(root: str) -> dict[str, bytes]:
    """Returns images and texts of a folder by their names."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for name in ("images", "text")
        for path in Path(root, name).rglob("*.*")
    }


def test_shards_are_joined_where_an_undivided_run_would_be(
    invoke: Invoke, manifest: Path, backend: FakeBackend
) -> None:
    assert invoke("run", manifest, "--output-dir", "whole").code == 0
    for number in (1, 2):
        assert invoke("run", manifest, "--shard", f"{number}/2").code == 0
    ended = invoke("merge", "outputs/small-2-of-2", "outputs/small-1-of-2")
    assert (ended.code, ended.out) == (0, "outputs/small: 5 of 5 jobs done\n")
    assert ended.err == ("shard 1 of 2: outputs/small-1-of-2\nshard 2 of 2: outputs/small-2-of-2\n")
    assert files("outputs/small") == files("whole")
    loaded = len(backend.loaded)
    assert "nothing was left to run" in invoke("run", manifest).err
    assert len(backend.loaded) == loaded
    verified = invoke("status", "outputs/small", "--verify")
    assert verified.code == 0
    assert re.search(r"([67]) of \1 files are as they were written", verified.out)
    assert "calls=4" in (Path("outputs/small") / "summary.txt").read_text()
    settings = yaml.safe_load(Path("outputs/small/run.yaml").read_text())
    assert "shard" not in settings
    assert "shard 2 of 2" in Path("outputs/small/run.log").read_text()


def test_status_and_report_say_which_shard_a_folder_is(invoke: Invoke, manifest: Path) -> None:
    ended = invoke("run", manifest, "--shard", "2/2")
    assert "shard 2 of 2: " in ended.err
    values = invoke("status", "outputs/small-2-of-2", "--json").json
    assert values["shard"] == "2/2"
    assert values["jobs"] + values["elsewhere"] == 5
    lines = invoke("status", "outputs/small-2-of-2").out.splitlines()
    assert max(map(len, lines)) <= 80
    line = " ".join(part.strip() for part in lines)
    assert line.startswith("outputs/small-2-of-2: shard 2 of 2, ")
    assert f"{values['elsewhere']} in other shards" in line
    assert "small-2-of-2: shard 2 of 2" in invoke("report", "outputs/small-2-of-2").err
    assert invoke("report", "outputs/small-2-of-2", "--json").json["shard"] == "2/2"
    assert yaml.safe_load(Path("outputs/small-2-of-2/run.yaml").read_text())["shard"] == "2/2"


def test_a_missing_shard_is_named_with_what_to_do(invoke: Invoke, manifest: Path) -> None:
    invoke("run", manifest, "--shard", "1/3")
    ended = invoke("merge", "outputs/small-1-of-3")
    assert ended.code == 75
    assert "  missing     shards 2, 3 of 3\n" in ended.out
    assert "sensebatch run to run what is missing" in ended.out
    values = invoke("merge", "outputs/small-1-of-3", "--json").json
    assert (values["exit_code"], values["missing"], values["shards"]) == (75, [2, 3], 3)
    assert values["jobs"] == 5
    assert invoke("run", manifest).code == 0
    assert invoke("status", "outputs/small", "--json").json["done"] == 5


def test_a_failed_job_gives_exit_code_1(invoke: Invoke, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace("a line", "a line that fails"))
    assert {invoke("run", manifest, "--shard", f"{n}/2").code for n in (1, 2)} == {0, 1}
    ended = invoke("merge", "outputs/small-1-of-2", "outputs/small-2-of-2")
    assert (ended.code, "4 of 5 jobs done, 1 failed" in ended.out) == (1, True)


def test_mistakes_are_named_and_nothing_is_made(invoke: Invoke, manifest: Path) -> None:
    ended = invoke("run", manifest, "--shard", "4/3")
    assert ended.code == 2
    assert "--shard: expected I/N, the number of a shard" in ended.err
    ended = invoke("merge", "nowhere")
    assert ended.code == 2
    assert "--output-dir: expected where to join the shards" in ended.err
    invoke("run", manifest, "--shard", "1/2", "--output-dir", "here")
    ended = invoke("run", manifest, "--output-dir", "here")
    assert (ended.code, "say --shard 1/2" in ended.err) == (2, True)
    assert not Path("outputs").exists()


def test_a_shard_says_its_own_number_of_jobs_before_anything_is_loaded(
    invoke: Invoke, manifest: Path
) -> None:
    own = []
    for number in (1, 2):
        said = invoke("run", manifest, "--shard", f"{number}/2").err
        first = re.search(r"(\d) of (\d) jobs? to run in ", said)
        claimed = re.search(rf"shard {number} of 2: (\d) of 5 jobs", said)
        assert first is not None, said
        assert claimed is not None, said
        assert first.groups() == (claimed[1], claimed[1])
        assert first.start() < said.index("loading") < claimed.start()
        own.append(int(claimed[1]))
    assert sum(own) == 5
    assert 5 not in own
