"""Functions of the user's that judge images, on the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sensebatch.manifest.accept import _judged_by
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.usefixtures("backend")

ROWS = """
version: 1
defaults: {width: 64, height: 32, num_steps: 2}
jobs: [{id: a, prompt: a dot, keep: 1, tries: 3}]
"""


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest, and a configuration that names a function of a module beside it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "judges_of_cli", raising=False)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/judges_of_cli.py").write_text(
        "def second(image, job):\n    return job['seed'] == 43\n"
    )
    (tmp_path / "own/c.yaml").write_text("accept: judges_of_cli:second\n")
    path = tmp_path / "m.yaml"
    path.write_text(ROWS)
    return path


def test_a_run_calls_the_function_beside_its_configuration(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    ended = invoke("run", manifest, "--config", tmp_path / "own/c.yaml", "--drop-rejected")
    assert ended.code == 0
    assert "accepted 1 of 1 image wanted; 1 of 2 judged passed (50%)" in ended.err
    assert "2 images made in" in ended.err
    assert ", 1 rejected image removed\n" in ended.err
    assert [path.name for path in Path("outputs/m/images").iterdir()] == ["a-seed=43.png"]
    # The settings of the run say where the function is, so they repeat it from anywhere.
    again = invoke("run", manifest, "--config", "outputs/m/run.yaml", "--output-dir", "again")
    assert again.code == 0
    assert "accepted 1 of 1 image wanted" in again.err


def test_rejected_images_are_removed_though_nothing_is_left_to_draw(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    config = ("--config", tmp_path / "own/c.yaml")
    images = Path("outputs/m/images")
    invoke("run", manifest, *config)
    assert sorted(path.name for path in images.iterdir()) == ["a-seed=42.png", "a-seed=43.png"]
    ended = invoke("run", manifest, *config, "--drop-rejected")
    assert "nothing was left to run, 1 rejected image removed" in ended.err
    assert [path.name for path in images.iterdir()] == ["a-seed=43.png"]
    (row,) = invoke("jobs", "outputs/m", "--where", "verdict = 'rejected'", "--json").json
    assert row["id"] == "a-seed=42"
    again = invoke("run", manifest, *config, "--drop-rejected", "--json")
    assert (again.code, again.json["this_run"]["dropped"]) == (0, 0)
    assert "removed" not in again.err
    assert invoke("status", "outputs/m", "--verify").code == 0


def test_a_function_that_judges_again_is_not_said_to_be_a_worker(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    config = ("--config", tmp_path / "own/c.yaml")
    invoke("run", manifest, *config)
    with (tmp_path / "own/judges_of_cli.py").open("a") as file:
        file.write("# edited\n")
    _judged_by.cache_clear()  # as in another process
    ended = invoke("run", manifest, *config)
    assert "ask by function, 2 jobs in " in ended.err
    assert " on worker " not in ended.err


def test_what_a_run_says_of_an_edited_function_is_what_it_does(
    invoke: Invoke, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "others_of_cli", raising=False)
    other = tmp_path / "own/others_of_cli.py"
    other.write_text("def other(image, job):\n    return True\n")
    (tmp_path / "own/c.yaml").write_text("accept: [judges_of_cli:second, others_of_cli:other]\n")
    run = ("run", manifest, "--config", tmp_path / "own/c.yaml", "--drop-rejected")
    invoke(*run)
    other.write_text("def other(image, job):\n    return True  # edited\n")
    _judged_by.cache_clear()  # as in another process
    dry = invoke(*run, "--dry-run", "--json").json
    verdicts = {job["id"]: (job["verdict"], job["reason"]) for job in dry["jobs"]}
    assert verdicts["a-seed=43-others_of_cli.other"] == ("redrawn", "function changed")
    # The first function rejects the image that was removed, so nothing more is asked about it.
    assert verdicts["a-seed=42-others_of_cli.other"][0] == "held"
    said = invoke(*run).err
    assert "1 job with a changed definition, will be run again\n" in said
    assert "1 job changed or without files, will be run again only if needed\n" in said
    assert "ask by function, 1 job in " in said


def test_what_a_function_prints_is_not_on_stdout(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    (tmp_path / "own/judges_of_cli.py").write_text(
        "print('imported')\ndef second(image, job):\n    print('judging')\n    return True\n"
    )
    ended = invoke("run", manifest, "--config", tmp_path / "own/c.yaml", "--json")
    assert ended.json["this_run"]["images"] == 1
    assert "imported\n" in ended.err
    assert "judging\n" in ended.err
    out, err = sys.stdout, sys.stderr
    invoke("run", manifest, "--config", tmp_path / "own/c.yaml", "--output-dir", "again")
    assert (sys.stdout, sys.stderr) == (out, err)


def test_what_a_function_has_others_write_is_not_on_stdout(
    invoke: Invoke, manifest: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own/judges_of_cli.py").write_text(
        "import os, subprocess, sys\n"
        "os.write(1, b'imported\\n')\n"
        "def second(image, job):\n"
        "    os.write(1, b'judging\\n')\n"
        "    subprocess.run([sys.executable, '-c', 'print(\"started\")'], check=True)\n"
        "    return True\n"
    )
    ended = invoke("run", manifest, "--config", tmp_path / "own/c.yaml", "--json")
    assert ended.json["this_run"]["images"] == 1
    for line in ("imported\n", "judging\n", "started\n"):
        assert line in ended.err
    os.write(1, b"afterwards")
    assert capfd.readouterr() == ("afterwards", "")


@pytest.mark.parametrize("closed", ["__stdout__", "__stderr__"])
def test_a_file_in_the_place_of_a_closed_output_is_left_alone(
    invoke: Invoke, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    (tmp_path / "own/judges_of_cli.py").write_text(
        "import os\ndef second(image, job):\n    os.write(1, b'in it')\n    return True\n"
    )
    monkeypatch.setattr(sys, closed, None)
    ended = invoke("run", manifest, "--config", tmp_path / "own/c.yaml")
    assert ended.code == 0
    assert "in it" in ended.out


def test_a_function_that_is_missing_ends_a_run_before_it_begins(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    (tmp_path / "own/c.yaml").write_text("accept: judges_of_cli:third\n")
    ended = invoke("run", manifest, "--config", tmp_path / "own/c.yaml")
    assert ended.code == 2
    assert "accept: expected a function third in " in ended.err
    assert not Path("outputs").exists()
    # What only reads the manifest runs none of it.
    (tmp_path / "own/judges_of_cli.py").write_text("raise SystemExit(7)\n")
    assert invoke("plan", manifest, "--config", tmp_path / "own/c.yaml").code == 0


def test_a_function_that_nothing_asks_for_is_warned_of(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    manifest.write_text(ROWS.replace(", keep: 1, tries: 3", ""))
    words = "judges_of_cli:second: called for no image, since no row of the manifest has accept"
    config = ("--config", tmp_path / "own/c.yaml")
    (tmp_path / "own/judges_of_cli.py").write_text("def second(image, job):\n    return True\n")
    for command in (["run"], ["plan"], ["manifest", "validate"], ["run", "--dry-run"]):
        assert invoke(*command, manifest, *config).err.count(words) == 1, command
    manifest.write_text(ROWS)
    for command in (["run"], ["plan"], ["manifest", "validate"], ["run", "--dry-run"]):
        assert words not in invoke(*command, manifest, *config).err, command
    small = ("--width", "64", "--height", "32", "--output", "dot.png")
    assert words not in invoke("t2i", "--prompt", "a dot", *small, *config).err


def test_what_a_function_raises_is_shown_and_kept_within_bounds(
    invoke: Invoke, manifest: Path, tmp_path: Path
) -> None:
    (tmp_path / "own/judges_of_cli.py").write_text(
        "def second(image, job):\n    raise ValueError('begin' + 'x' * 10**7 + 'end')\n"
    )
    ended = invoke("run", manifest, "--config", tmp_path / "own/c.yaml")
    assert "ValueError: begin" in ended.err
    folder = Path("outputs/m")
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = [path.read_text() for path in (folder / "run.log", *(folder / "errors").iterdir())]
    assert all("begin" in text and "end" in text for text in texts)
    assert len(texts) > 1
    assert len(ended.err) + sum(path.stat().st_size for path in files) < 10**6
