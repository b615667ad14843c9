"""Galleries as files: what is in them, what is made again, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sensebatch.dataset.duplicates import near_duplicates
from sensebatch.dataset.records import open_dataset
from sensebatch.dataset.selection import Selection
from sensebatch.errors import RunFolderError
from sensebatch.gallery.data import path_form
from sensebatch.gallery.make import Made, make_gallery
from sensebatch.jobs import InputImage
from sensebatch.tasks import Task
from tests.executor.fakes import Flag, make_job, run_folder
from tests.executor.test_judging import OWN, tries
from tests.gallery.runs import HOSTILE, HOSTILE_ID, make_input_file, make_run
from tests.store.test_acceptance import CONFIG, Judge, series
from tests.store.test_chains import child
from tests.store.test_dropped import DROPPING


def read_data(out: Path, name: str) -> Any:
    """Returns what a data file gives the page."""
    folder = out / "data"
    if name != "index":
        folder /= read_data(out, "index")["data"]
    text = (folder / f"{name}.js").read_text(encoding="utf-8")
    start = f'SB.give("{name}",'
    assert text.startswith(start)
    return json.loads(json.loads(text[len(start) : -2]))


def _word(out: Path, item: int, name: str) -> str | None:
    values = read_data(out, "items")["values"][name]
    code = values["codes"] if isinstance(values["codes"], int) else values["codes"][item]
    return None if code < 0 else values["words"][code]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def _make(root: Path, **changes: Any) -> Made:
    return make_gallery([root], root / "gallery", **changes)


def test_every_job_that_is_done_or_failed_is_an_item(root: Path) -> None:
    made = _make(root)
    out = made.page.parent
    ids = read_data(out, "items")["ids"]
    assert made.items == len(ids) == 11
    assert made.images == 11
    assert made.thumbnails_made == made.images
    broken = ids.index("broken")
    assert _word(out, broken, "status") == "failed"
    assert _word(out, broken, "error_type") == "ValueError"
    assert _word(out, ids.index("red-2"), "colour") == "red"
    assert _word(out, ids.index(HOSTILE_ID), "by") == "me"


def test_details_have_texts_inputs_and_errors(root: Path) -> None:
    out = _make(root).page.parent
    ids, details = read_data(out, "items")["ids"], read_data(out, "details-0")
    of = dict(zip(ids, details, strict=True))
    assert of["story"]["is_story"] is True
    assert "First <b>a dot</b>." in of["story"]["text"]
    assert of["thought"]["text"].startswith("thinking in")
    assert of["broken"]["error"] == "NaN in the output"
    assert "ValueError" in of["broken"]["traceback"]
    (shown,) = of["edited"]["inputs"]
    assert shown == {"name": "harbour #1.png", "url": "../../inputs/harbour%20%231.png"}
    assert of["edited"]["command"].startswith("sensebatch edit --image ")
    assert of["edited"]["manifest"].startswith('- id: "edited"\n  task: "edit"\n')


def test_inputs_are_found_where_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_input_file(tmp_path / "in" / "a.png")
    image = replace(make_input_file(tmp_path / "in" / "a.png"), path="in/a.png")
    root = tmp_path / "outputs" / "run"
    make_run(root, [make_job("edit", Task.EDIT, images=(image,), think=False)])
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    out = _make(root).page.parent
    (shown,) = read_data(out, "details-0")[0]["inputs"]
    assert (out / shown["url"]).resolve() == tmp_path / "in" / "a.png"
    # Another file in its place is not taken for it.
    make_input_file(tmp_path / "in" / "a.png", "blue")
    _make(root)
    (shown,) = read_data(out, "details-0")[0]["inputs"]
    assert (out / shown["url"]).resolve() == tmp_path / "away" / "in" / "a.png"


def test_inputs_that_a_browser_would_show_otherwise_are_converted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 32), "red").save(tmp_path / "in" / "turned.jpg", exif=exif)
    content = (tmp_path / "in" / "turned.jpg").read_bytes()
    image = InputImage(
        path=str(tmp_path / "in" / "turned.jpg"),
        sha256=hashlib.sha256(content).hexdigest(),
        height=64,
        width=32,
        corrections="orientation",
    )
    root = make_run(tmp_path / "run", [make_job("e", Task.EDIT, images=(image,), think=False)])
    out = _make(root).page.parent
    (shown,) = read_data(out, "details-0")[0]["inputs"]
    with Image.open(out / shown["url"]) as converted:
        assert converted.size == (32, 64)


def test_items_have_the_settings_of_their_task_alone(root: Path) -> None:
    out = _make(root).page.parent
    items = read_data(out, "items")
    of = dict(zip(items["ids"], items["values"]["img_cfg_scale"]["numbers"], strict=True))
    assert of["edited"] is not None
    assert of["red-1"] is None
    assert "in_manifest" not in items["values"]
    make_run(root, [make_job("red-1", prompt="a red dot", seed=1)])
    make_gallery([root], out, selection=Selection(removed=True))
    removed = [_word(out, item, "in_manifest") for item in range(3)]
    assert removed == ["yes", "no", "no"]


def test_hostile_texts_are_only_in_data_files(root: Path) -> None:
    out = _make(root).page.parent
    assert HOSTILE in read_data(out, "prompts-0")
    for path in out.rglob("*"):
        if path.is_file() and "data" not in path.relative_to(out).parts:
            assert b"harmed" not in path.read_bytes()


def test_nothing_is_drawn_again_for_a_gallery_that_is_made_again(root: Path) -> None:
    _make(root)
    first = {path.name for path in (root / "gallery" / "data").iterdir()}
    made = _make(root)
    assert made.thumbnails_made == 0
    assert {path.name for path in (root / "gallery" / "data").iterdir()} == first


def test_a_gallery_follows_its_run(root: Path) -> None:
    out = _make(root).page.parent
    before = read_data(out, "index")["data"]
    jobs = [make_job("new"), make_job("red-1", prompt="a red dot", seed=1)]
    make_run(root, jobs)
    made = _make(root)
    assert read_data(out, "items")["ids"] == ["new", "red-1"]
    assert made.thumbnails_made >= 1
    assert not (out / "data" / before).exists()
    assert {path.name for path in (out / "data").iterdir()} == {
        "index.js",
        read_data(out, "index")["data"],
    }


def test_a_run_in_progress_shows_what_is_done(tmp_path: Path) -> None:
    jobs = [make_job(f"j{n}") for n in range(8)]
    run_folder(tmp_path / "run", jobs, stop=Flag(after=2))
    made = _make(tmp_path / "run")
    assert 0 < made.items < 8
    assert made.pending == 8 - made.items
    report = read_data(made.page.parent, "report")["runs"][0]
    assert f"{made.pending} still to be run" in report["words"]
    assert read_data(made.page.parent, "index")["pending"] == made.pending


def test_the_report_counts_what_failed_jobs_block(tmp_path: Path) -> None:
    jobs = [make_job("a", prompt="this fails"), child("b", "a"), make_job("c")]
    out = _make(make_run(tmp_path / "run", jobs)).page.parent
    assert read_data(out, "items")["ids"] == ["a", "c"]
    words = read_data(out, "report")["runs"][0]["words"]
    assert words == "1 job done; 1 failed; 1 blocked by jobs that failed"


def test_runs_with_equal_ids_stay_apart(tmp_path: Path) -> None:
    roots = [tmp_path / "a" / "night", tmp_path / "b" / "night"]
    for number, root in enumerate(roots):
        make_run(root, [make_job("same", seed=number), make_job("other")])
    out = tmp_path / "both"
    made = make_gallery(roots, out)
    index, items = read_data(out, "index"), read_data(out, "items")
    assert made.items == 4
    assert items["ids"] == ["same", "other", "same", "other"]
    assert items["run"] == [0, 0, 1, 1]
    assert [run["name"] for run in index["runs"]] == ["a/night", "b/night"]
    assert [run["root"] for run in index["runs"]] == ["../a/night/", "../b/night/"]
    assert len(set(items["marks"])) == 3


def test_a_path_that_is_not_of_its_id_is_kept_as_it_is() -> None:
    assert path_form("images/a.png", "a", 0) == "images/{id}.png"
    assert path_form("images/a/001.png", "a", 1) == "images/{id}/{n}.png"
    assert path_form("images/a/001.png", "a", 0) == "=images/a/001.png"
    assert path_form("images/old{id}.png", "new", 0) == "=images/old{id}.png"


def test_a_missing_image_is_named_and_the_others_are_shown(root: Path) -> None:
    (root / "images" / "red-1.png").unlink()
    made = _make(root)
    (problem,) = made.problems
    assert "red-1.png: No such file or directory" in problem
    items = read_data(made.page.parent, "items")
    assert items["cells"].count(-1) == 1


def test_images_that_look_alike_are_told(tmp_path: Path) -> None:
    seeds = {"j0": 5, "j1": 5, "j2": 6}
    jobs = [make_job(job_id, prompt="a dot", seed=seed) for job_id, seed in seeds.items()]
    root = make_run(tmp_path / "run", jobs)
    out = _make(root).page.parent
    with open_dataset(root) as dataset:
        assert near_duplicates(dataset.records()) == {"j0": "j0", "j1": "j0", "j2": "j2"}
    assert [_word(out, item, "alike") for item in range(3)] == ["j0", "j0", None]
    assert [_word(out, item, "near_duplicate") for item in range(3)] == ["no", "yes", None]


def test_copied_images_make_a_gallery_that_can_be_moved(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "portable"
    make_gallery([root], out, copies_images=True)
    run = read_data(out, "index")["runs"][0]
    copied = out / run["root"]
    of_run = {path.relative_to(root) for path in (root / "images").rglob("*.png")}
    assert {path.relative_to(copied) for path in copied.rglob("*.png")} == of_run
    edited = read_data(out, "items")["ids"].index("edited")
    (shown,) = read_data(out, "details-0")[edited]["inputs"]
    assert (out / shown["url"]).is_file()
    # What is there and unchanged is not copied again; what is no longer shown is removed.
    times = {path: path.stat().st_ctime_ns for path in copied.rglob("*.png")}
    make_gallery([root], out, copies_images=True)
    assert times == {path: path.stat().st_ctime_ns for path in copied.rglob("*.png")}
    make_gallery([root], out, copies_images=True, selection=Selection(tasks=[Task.EDIT]))
    assert [path.name for path in copied.rglob("*.png")] == ["edited.png"]
    make_gallery([root], out)
    assert not copied.exists()


def test_a_folder_that_is_not_a_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(RunFolderError, match=r"photos: expected a run's folder, found no state.db"):
        make_gallery([tmp_path / "photos"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_anything_to_show_is_refused(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", [make_job("a")], stop=Flag(after=0))
    with pytest.raises(RunFolderError, match="expected a job that is done or has failed"):
        make_gallery([tmp_path / "run"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_and_its_copy_are_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    with pytest.raises(RunFolderError, match=r"copy: expected another run than .*run, found the"):
        make_gallery([root, tmp_path / "copy"], tmp_path / "out")


def test_a_folder_with_other_files_is_not_written_to(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine"
    (other / "sheets").mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"mine: expected a gallery, an empty folder or none"):
        make_gallery([root], other)
    assert [path.name for path in other.iterdir()] == ["sheets"]


def test_tries_are_items_with_their_checks_and_questions_about_them_are_not(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_folder(root, series("cat", "dog", prompt="a {animal}"), CONFIG, engine=Judge())
    out = make_gallery([root], root / "gallery").page.parent
    items = read_data(out, "items")
    with open_dataset(root) as dataset:
        tries = {one.id: one for one in dataset.records() if one.judgement is not None}
    assert set(items["ids"]) == tries.keys()
    details = dict(zip(items["ids"], read_data(out, "details-0"), strict=True))
    for place, job_id in enumerate(items["ids"]):
        assert _word(out, place, "verdict") == tries[job_id].verdict
        ((question, said),) = details[job_id]["checks"]
        score = tries[job_id].value("score")
        assert (question, said) == ("Is it good?", f"yes {score:.5g}, needs 0.6")
        assert items["values"]["score"]["numbers"][place] == pytest.approx(score, rel=1e-5)
    # Asked for, the questions are there.
    asked = make_gallery([root], root / "asked", selection=Selection(tasks=(Task.ASK,)))
    assert asked.items == len(tries)


def test_images_that_were_removed_are_items_without_one(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_folder(root, series("cat", "dog", think=True), DROPPING, engine=Judge())
    made = make_gallery([root], root / "gallery")
    assert not made.problems
    assert 0 < made.images < made.items
    out = made.page.parent
    details = read_data(out, "details-0")
    dropped = [_word(out, place, "dropped") == "yes" for place in range(made.items)]
    # The thought went with the image.
    assert ["text" not in one for one in details] == dropped
    assert sum(dropped) == made.items - made.images


def test_a_verdict_that_failed_is_among_the_checks(tmp_path: Path) -> None:
    def fails(_: object, row: Mapping[str, Any]) -> bool:
        if row["seed"] == 42:
            raise ValueError("too dark")
        return True

    jobs = tries(OWN)
    root = tmp_path / "run"
    run_folder(root, jobs, CONFIG, functions={"m:own": fails})
    out = make_gallery([root], root / "gallery").page.parent
    of = dict(zip(read_data(out, "items")["ids"], read_data(out, "details-0"), strict=True))
    assert of["cat-seed=42"]["checks"] == [["m:own", "failed, so it speaks against the image"]]
    assert of["cat-seed=43"]["checks"] == [["m:own", "yes 1, needs 0.8"]]
    # No command can ask a function.
    assert {"command", "manifest"}.isdisjoint(of["cat-seed=42-m.own"])
    assert {"command", "manifest"} <= of["cat-seed=42"].keys()


def test_a_question_has_what_was_said_before_it(tmp_path: Path) -> None:
    image = make_input_file(tmp_path / "in" / "a.png")
    before = (("<image> A dot?", "yes"),)
    asked = make_job("q", Task.ASK, prompt="Which colour?", images=(image,), history=before)
    out = _make(make_run(tmp_path / "run", [asked])).page.parent
    assert read_data(out, "details-0")[0]["history"] == [["<image> A dot?", "yes"]]
    assert "history" not in read_data(out, "items")["values"]
