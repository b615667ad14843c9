"""What `sensebatch gallery` prints and refuses; tests/gallery looks at the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sensebatch.dataset.records import open_dataset
from tests.cli.conftest import Invoke
from tests.executor.fakes import Flag, make_job, run_folder

pytestmark = pytest.mark.slow


def _run(root: Path, count: int = 3) -> Path:
    run_folder(root, [make_job(f"job{n}") for n in range(count)])
    return root


def test_a_gallery_is_made_in_its_runs_folder(invoke: Invoke, tmp_path: Path) -> None:
    root = _run(tmp_path / "night")
    ended = invoke("gallery", root)
    page = root / "gallery" / "index.html"
    assert page.is_file()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "3 jobs, 3 images; 3 thumbnails made now",
        f"open {page.as_uri()}",
    ]
    assert invoke("gallery", root).out.startswith("3 jobs, 3 images; 0 thumbnails made now\n")


def test_json_says_what_was_made(invoke: Invoke, tmp_path: Path) -> None:
    root = _run(tmp_path / "night")
    out = tmp_path / "elsewhere"
    assert invoke("gallery", root, "--output", out, "--json").json == {
        "page": str(out / "index.html"),
        "items": 3,
        "images": 3,
        "thumbnails_made": 3,
        "pending": 0,
        "running": False,
        "problems": [],
    }


def test_an_incomplete_run_says_what_is_to_come(invoke: Invoke, tmp_path: Path) -> None:
    run_folder(tmp_path / "run", [make_job(f"j{n}") for n in range(8)], stop=Flag(after=2))
    out = invoke("gallery", tmp_path / "run").out.splitlines()
    assert out[1].endswith("to come (the run is not complete); the same command adds them")


def test_images_that_cannot_be_read_are_warned_of(invoke: Invoke, tmp_path: Path) -> None:
    root = _run(tmp_path / "run", count=8)
    for number in range(7):
        (root / "images" / f"job{number}.png").write_bytes(b"not an image")
    ended = invoke("gallery", root)
    assert ended.code == 0
    warnings = ended.err.splitlines()
    assert len(warnings) == 6
    assert "job0.png: expected an image, found something else" in warnings[0]
    assert warnings[-1] == "warning: no thumbnails of 2 more images"


def test_only_the_jobs_that_are_asked_for_are_shown(invoke: Invoke, tmp_path: Path) -> None:
    root = _run(tmp_path / "run")
    ended = invoke("gallery", root, "--where", "id <> 'job1'", "--json")
    assert ended.json["items"] == 2
    ended = invoke("gallery", root, "--where", "id = 'other'")
    assert ended.code == 2
    assert "run: expected a job that was asked for that is done or has failed" in ended.err
    _run(root, 1)
    assert invoke("gallery", root, "--json").json["items"] == 1
    assert invoke("gallery", root, "--removed", "--json").json["items"] == 3


def test_a_gallery_of_picks_warns_of_those_that_do_not_count(
    invoke: Invoke, tmp_path: Path
) -> None:
    root = _run(tmp_path / "run")
    with open_dataset(root) as dataset:
        run = dataset.run_id
    jobs = {"job1": {"pick": "keep"}, "job2": {"pick": "keep", "key": "0" * 64}}
    picks = tmp_path / "picks.json"
    picks.write_text(json.dumps({"sensebatch_picks": 1, "runs": [{"run": run, "jobs": jobs}]}))
    ended = invoke("gallery", root, "--picks", picks, "--json")
    assert ended.json["items"] == 1
    assert "job2" in ended.err


def test_several_runs_need_a_folder(invoke: Invoke, tmp_path: Path) -> None:
    roots = [_run(tmp_path / name, 1) for name in ("a", "b")]
    ended = invoke("gallery", *roots)
    assert ended.code == 2
    assert "--output: expected a folder for the gallery of several runs, found none" in ended.err
    assert invoke("gallery", *roots, "--output", tmp_path / "both").code == 0


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_what_is_not_a_runs_folder_is_refused(invoke: Invoke, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    ended = invoke("gallery", tmp_path / name)
    assert ended.code == 2
    assert f"{name}: expected a run's folder, found no" in ended.err
    assert not (tmp_path / name / "gallery").exists()


def test_a_gallery_starts_without_torch(tmp_path: Path) -> None:
    root = _run(tmp_path / "run", 1)
    code = (
        "import sys; from sensebatch.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: print(ended.code, 'torch' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "gallery", str(root)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines()[-1] == "0 False"
