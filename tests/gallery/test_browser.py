"""Galleries as people see them: opened from disk in a real browser, by mouse and by keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sensebatch.dataset.picks import Pick, read_picks
from sensebatch.dataset.records import open_dataset
from sensebatch.dataset.selection import Selection
from sensebatch.gallery.make import make_gallery
from sensebatch.gallery.rows import manifest_row
from sensebatch.report.summary import read_log, summarise
from sensebatch.tasks import Task
from tests.executor.fakes import Flag, make_job, run_folder
from tests.gallery.browser import Opened, ids, open_item
from tests.gallery.runs import HOSTILE, HOSTILE_ID, make_input_file, make_run
from tests.gallery.synthetic import make_synthetic
from tests.store.test_acceptance import CONFIG, Judge, series
from tests.store.test_chains import child
from tests.store.test_dropped import DROPPING

pytestmark = pytest.mark.slow

ALL = [
    *("red-1", "red-2", "red-3", "green-1", "green-2", "green-3"),
    *(HOSTILE_ID, "thought", "edited", "story", "broken"),
]


def _run_id(root: Path) -> str:
    with open_dataset(root) as dataset:
        return dataset.run_id


def _search(page: Any, words: str) -> None:
    page.fill("#search", words)
    page.wait_for_function("(words) => SB.lastSearch === words", arg=words)


def test_a_gallery_opens_from_disk_with_every_item(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    assert ids(page) == ALL
    assert page.inner_text("#count") == "11 items"
    assert page.title() == "night - sensebatch gallery"
    # Every thumbnail is a part of a sheet that the browser could read.
    sheets = page.evaluate(
        "Promise.all([...document.querySelectorAll('.thumb')].map(async (node) => {"
        " const image = new Image(); image.src = node.style.backgroundImage.slice(5, -2);"
        " await image.decode(); return image.naturalWidth; }))"
    )
    assert len(sheets) == 10
    assert set(sheets) == {4 * 194}


def test_hostile_texts_are_texts_in_every_view(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    assert HOSTILE in page.locator(f'.tile[data-item="{HOSTILE_ID}"] .caption').inner_text()
    open_item(page, HOSTILE_ID)
    assert page.inner_text(".prompt") == HOSTILE
    assert page.inner_text(".bar .id") == HOSTILE_ID
    # Its image is found, whatever its name is.
    page.wait_for_function("() => document.querySelector('.layer img').naturalWidth === 64")
    assert "harmed" not in page.evaluate("Object.keys(window).join()")
    # A path that is no form of the id is taken as it is.
    literal = page.evaluate(
        "SB.items.files[0] = SB.index.files.push('=images/a {n}#.png') - 1, SB.imageUrl(0)"
    )
    assert literal == "../images/a%20%7Bn%7D%23.png"
    page.keyboard.press("Escape")
    assert page.get_by_label("<i>tag</i>", exact=False).count() == 1
    assert page.locator("img[src='x'], i:not(.swatch), b:has-text('a dot')").count() == 0
    page = opened.page(night / "gallery", "view=axes&rows=prompt&columns=")
    assert page.get_by_role("rowheader", name="<img src=x", exact=False).count() == 1
    page = opened.page(night / "gallery", f"item={_run_id(night)}/story")
    assert "First <b>a dot</b>." in page.inner_text(".story")


def test_the_policy_blocks_markup_that_came_in_all_the_same(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    blocked = page.evaluate(
        """async () => {
          const found = [];
          addEventListener("securitypolicyviolation",
            (event) => found.push(event.effectiveDirective));
          document.body.insertAdjacentHTML("beforeend",
            "<img src=x onerror='window.harmed = 1'><img src='https://example.invalid/x.png'>");
          await new Promise((done) => setTimeout(done, 300));
          return [window.harmed, ...found.sort()];
        }"""
    )
    assert blocked == [None, "img-src", "script-src-attr"]
    opened.problems.clear()
    opened.requests.clear()


def test_search_takes_words_phrases_and_columns(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    for words, expected in {
        "green": ["green-1", "green-2", "green-3"],
        "dot red": ["red-1", "red-2", "red-3"],
        '"dot red"': [],
        "dot -red -story": ["green-1", "green-2", "green-3"],
        "seed:2": ["red-2", "green-2"],
        "dot seed>=2 colour:red": ["red-2", "red-3"],
        "status:failed": ["broken"],
        "ValueError": ["broken"],
        "<i>tag</i>": [HOSTILE_ID],
        "javascript:alert(1)": [HOSTILE_ID],
        "nothing like it": [],
    }.items():
        _search(page, words)
        assert ids(page) == expected, words
    assert page.locator(".notice").inner_text().startswith("Nothing matches.")
    page.get_by_role("button", name="Clear search and filters").click()
    assert ids(page) == ALL


def test_facets_narrow_and_count(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    page.locator('[data-column="task"]').get_by_label("t2i").check()
    page.locator('[data-column="colour"] summary').click()
    colours = page.locator('[data-column="colour"] label')
    assert colours.all_inner_texts() == ["green\n3", "red\n3", "none\n3"]
    colours.filter(has_text="red").locator("input").check()
    assert ids(page) == ["red-1", "red-2", "red-3"]
    assert page.inner_text("#count") == "3 of 11 items"
    # An item that two filters leave out is not counted by either.
    tasks = page.locator('[data-column="task"] label').all_inner_texts()
    assert sorted(tasks) == ["edit\n0", "interleave\n0", "t2i\n3"]
    # Other values of the same facet count what choosing them would add.
    assert colours.all_inner_texts() == ["green\n3", "red\n3", "none\n3"]
    page.locator("#header .chip", has_text="Task: t2i").click()
    page.locator("#header .chip", has_text="colour: red").click()
    assert ids(page) == ALL


def test_any_column_sorts_both_ways(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery", "q=dot -story")
    page.select_option("#sort", "seed")
    assert ids(page) == ["red-1", "green-1", "red-2", "green-2", "red-3", "green-3"]
    page.click("#direction")
    assert ids(page) == ["red-3", "green-3", "red-2", "green-2", "red-1", "green-1"]
    page.select_option("#sort", "prompt")
    assert ids(page)[:3] == ["red-1", "red-2", "red-3"]
    page.select_option("#sort", "id")
    assert ids(page) == ["red-3", "red-2", "red-1", "green-3", "green-2", "green-1"]


def test_the_address_keeps_the_view(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    _search(page, "dot")
    page.locator('[data-column="tags"]').get_by_label("none", exact=False).check()
    page.select_option("#sort", "seed")
    page.click("#direction")
    page.evaluate(
        "document.getElementById('size').value = 300;"
        "document.getElementById('size').dispatchEvent(new Event('input'))"
    )
    open_item(page, "red-2")
    again = opened.page(night / "gallery", page.url.partition("#")[2])
    assert again.inner_text(".bar .id") == "red-2"
    again.keyboard.press("Escape")
    assert ids(again) == ids(page)
    assert again.input_value("#search") == "dot"
    assert again.locator("#header .chip").all_inner_texts() == [
        "Tags: none \N{MULTIPLICATION SIGN}"
    ]
    assert again.input_value("#size") == "300"
    # Back closes the item that was opened last.
    page.go_back()
    page.wait_for_selector("dialog.viewer", state="detached")


def test_everything_is_done_by_keys(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    focused = "document.activeElement.dataset.item"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "red-2"
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog.viewer .panel h3")
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".bar .id") == "red-3"
    page.keyboard.press("k")
    assert page.locator("button.keep[aria-pressed=true]").count() == 1
    page.keyboard.press("Escape")
    # The browser puts the focus back first, where it was; the page then has it follow.
    page.wait_for_function(f"() => {focused} === 'red-3'")
    page.keyboard.press("End")
    assert page.evaluate(focused) == "broken"
    page.keyboard.press("r")
    page.keyboard.press("/")
    page.keyboard.type("green")
    page.wait_for_function("() => SB.lastSearch === 'green'")
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "green-1"
    page.keyboard.press("g")
    page.keyboard.press("a")
    assert page.locator(".axes-table").count() == 1
    page.keyboard.press("?")
    assert page.locator("dialog.help").count() == 1
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")


def test_picks_stay_in_the_browser_and_are_saved_as_a_file(
    opened: Opened, night: Path, tmp_path: Path
) -> None:
    page = opened.page(night / "gallery")
    page.locator('.tile[data-item="red-1"]').focus()
    page.keyboard.press("k")
    page.locator(f'.tile[data-item="{HOSTILE_ID}"]').focus()
    page.keyboard.press("r")
    page.keyboard.press("t")
    page.keyboard.type("<b>odd</b>")
    page.keyboard.press("Enter")
    page.close()
    page = opened.page(night / "gallery")
    assert page.locator('.tile[data-pick="keep"]').get_attribute("data-item") == "red-1"
    page.locator('[data-column="pick"]').get_by_label("reject").check()
    assert ids(page) == [HOSTILE_ID]
    page.click("#picks summary")
    with page.expect_download() as download:
        page.click("#save-picks")
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    picks = read_picks(saved)
    of_run = picks.of_run(_run_id(night))
    assert of_run["red-1"].pick is Pick.KEEP
    assert (of_run[HOSTILE_ID].pick, of_run[HOSTILE_ID].tags) == (Pick.REJECT, ("<b>odd</b>",))
    with open_dataset(night) as dataset:
        chosen = [record.id for record in dataset.records(Selection(picks=picks))]
    assert chosen == ["red-1"]


def test_a_picks_file_is_opened_elsewhere(opened: Opened, night: Path, tmp_path: Path) -> None:
    with open_dataset(night) as dataset:
        keys = {record.id: record.key for record in dataset.records()}
        run = dataset.run_id
    jobs = {
        "red-2": {"pick": "keep", "tags": ["best"], "key": keys["red-2"]},
        "red-3": {"pick": "keep", "key": "0" * 64},
        "unknown": {"pick": "keep"},
    }
    file = tmp_path / "picks.json"
    file.write_text(json.dumps({"sensebatch_picks": 1, "runs": [{"run": run, "jobs": jobs}]}))
    page = opened.page(night / "gallery")
    page.set_input_files("#picks input[type=file]", file)
    page.wait_for_selector('.tile[data-pick="keep"]')
    assert "2 are of other runs or of images that were replaced" in page.inner_text("#status")
    assert page.locator('.tile[data-pick="keep"]').get_attribute("data-item") == "red-2"
    file.write_text("{}")
    page.set_input_files("#picks input[type=file]", file)
    page.wait_for_function(
        "() => document.getElementById('status').textContent.includes('not a picks file')"
    )


def test_two_pages_of_a_run_have_the_same_picks(opened: Opened, night: Path) -> None:
    pages = [opened.page(night / "gallery") for _ in range(2)]
    for page, job_id in zip(pages, ("red-1", "red-2"), strict=True):
        page.locator(f'.tile[data-item="{job_id}"]').focus()
        page.keyboard.press("k")
        for other in pages:
            other.wait_for_selector(f'.tile[data-item="{job_id}"][data-pick="keep"]')
    again = opened.page(night / "gallery")
    assert again.locator('.tile[data-pick="keep"]').count() == 2


def test_a_browser_that_keeps_nothing_says_so(opened: Opened, night: Path) -> None:
    opened.context.add_init_script("Storage.prototype.setItem = () => { throw new Error('full'); }")
    page = opened.page(night / "gallery")
    page.locator('.tile[data-item="red-1"]').focus()
    page.keyboard.press("k")
    page.wait_for_selector('.tile[data-item="red-1"][data-pick="keep"]')
    page.wait_for_function(
        "() => document.getElementById('status').textContent.includes('save the picks')"
    )


def test_a_pick_of_an_image_that_was_replaced_does_not_count(
    opened: Opened, tmp_path: Path
) -> None:
    root = make_run(tmp_path / "run", [make_job("a"), make_job("b")])
    make_gallery([root], root / "gallery")
    page = opened.page(root / "gallery")
    page.locator('.tile[data-item="a"]').focus()
    page.keyboard.press("k")
    page.locator('.tile[data-item="b"]').focus()
    page.keyboard.press("k")
    page.close()
    make_run(root, [make_job("a", seed=99), make_job("b")])
    make_gallery([root], root / "gallery")
    page = opened.page(root / "gallery")
    assert page.locator('.tile[data-pick="keep"]').get_attribute("data-item") == "b"


def test_an_item_shows_what_is_known_and_can_be_copied(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    open_item(page, "thought")
    panel = page.locator(".panel")
    assert "thinking in" in panel.inner_text()
    facts = dict(row.split("\t") for row in panel.locator("tr").all_inner_texts())
    assert (facts["Seed"], facts["Num steps"], facts["Size"]) == ("7", "2", "64x32")
    assert facts["Total"] == "8 s"
    panel.get_by_role("button", name="Copy manifest row").click()
    page.wait_for_function(
        "() => document.getElementById('status').textContent.startsWith('Copied')"
    )
    with open_dataset(night) as dataset:
        (job,) = (record.job for record in dataset.records() if record.id == "thought")
    assert page.evaluate("navigator.clipboard.readText()") == manifest_row(job)
    panel.get_by_role("button", name="Copy command line").click()
    page.wait_for_function(
        "() => navigator.clipboard.readText().then((text) => text.startsWith('sensebatch t2i '))"
    )


def test_zoom_follows_keys_and_wheel(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    open_item(page, "red-1")
    width = "document.querySelector('.plane').getBoundingClientRect().width"
    whole = page.evaluate(width)
    page.keyboard.press("+")
    assert page.evaluate(width) == pytest.approx(1.5 * whole)
    page.mouse.move(400, 400)
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"() => {width} > {1.6 * whole}")
    page.keyboard.press("0")
    assert page.evaluate(width) == pytest.approx(whole)
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".bar .id") == "red-2"


def test_an_edit_is_compared_with_its_input(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    open_item(page, "edited")
    page.wait_for_function("() => document.querySelector('.input-layer img')?.naturalWidth === 64")
    clip = "document.querySelector('.input-layer').style.clipPath"
    slider = page.get_by_label("How much of the input is shown")
    assert page.evaluate(clip) == "inset(0px 50% 0px 0px)"
    slider.focus()
    page.keyboard.press("Home")
    assert page.evaluate(clip) == "inset(0px 100% 0px 0px)"
    page.get_by_role("button", name="Input", exact=True).click()
    assert page.evaluate(clip) == "inset(0px 0% 0px 0px)"
    page.keyboard.press("s")
    assert page.get_by_role("button", name="Input | output").get_attribute("aria-pressed") == "true"


def test_a_story_is_text_and_images_in_their_order(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    assert page.locator('.tile[data-item="story"] .badge').inner_text() == "2"
    open_item(page, "story")
    parts = page.locator(".story > *").evaluate_all(
        "(nodes) => nodes.map((node) => node.querySelector('img') ? 'image' : node.textContent)"
    )
    assert parts == [
        "a dot becomes a line",
        "ThoughtTwo steps & a plan.",
        "First <b>a dot</b>.",
        "image",
        "Then a line.",
        "image",
    ]
    page.keyboard.press("]")
    page.keyboard.press("]")
    assert "Image 2 of 2" in page.inner_text(".below")
    page.get_by_role("button", name="Whole story").click()
    assert page.locator(".story").count() == 1


def test_an_answer_is_shown_as_text(opened: Opened, tmp_path: Path) -> None:
    image = make_input_file(tmp_path / "photo.png")
    question = make_job("q", Task.ASK, prompt="what is <b>it</b>?", images=(image,), think=True)
    root = make_run(tmp_path / "run", [question, make_job("a")])
    make_gallery([root], root / "gallery")
    page = opened.page(root / "gallery")
    assert page.inner_text(".snippet").startswith("what is <b>it</b>? 1 ")
    open_item(page, "q")
    asked, answer = page.locator(".story > p").all_inner_texts()
    assert asked == "what is <b>it</b>?"
    assert answer.startswith("what is <b>it</b>? 1 ")
    assert page.locator(".thought").inner_text().startswith("Thought")
    page.wait_for_function("() => document.querySelector('.story .inputs img').naturalWidth === 64")


def test_verdicts_and_scores_are_facets_and_checks_are_shown(
    opened: Opened, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    run_folder(root, series("cat", "dog"), CONFIG, engine=Judge())
    make_gallery([root], root / "gallery")
    page = opened.page(root / "gallery")
    with open_dataset(root) as dataset:
        tries = [one for one in dataset.records() if one.judgement is not None]
    scores = {one.id: one.value("score") for one in tries}
    rejected = {one.id: scores[one.id] for one in tries if one.verdict == "rejected"}
    page.locator('[data-column="verdict"]').get_by_label("rejected").check()
    assert page.inner_text("#count") == f"{len(rejected)} of {len(tries)} items"
    page.select_option("#sort", "score")
    assert ids(page) == sorted(rejected, key=lambda job_id: rejected[job_id])
    worst = ids(page)[0]
    open_item(page, worst)
    checks = page.locator(".panel section", has_text="Checks")
    assert f"yes {rejected[worst]:.5g}, needs 0.6" in checks.inner_text()


def test_an_image_that_was_removed_is_said_to_be(opened: Opened, tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_folder(root, series("cat", "dog"), DROPPING, engine=Judge())
    make_gallery([root], root / "gallery")
    with open_dataset(root) as dataset:
        dropped = [one.id for one in dataset.records() if one.is_dropped]
    page = opened.page(root / "gallery")
    assert page.get_by_text("rejected and removed").count() == len(dropped) > 0
    open_item(page, dropped[0])
    assert page.get_by_text("This image was rejected and removed.").is_visible()


def test_a_question_is_shown_after_what_was_said_before(opened: Opened, tmp_path: Path) -> None:
    image = make_input_file(tmp_path / "in" / "a.png")
    before = (("<image> A dot?", "It is."),)
    asked = make_job("q", Task.ASK, prompt="Which colour?", images=(image,), history=before)
    root = make_run(tmp_path / "run", [asked])
    make_gallery([root], root / "gallery")
    page = opened.page(root / "gallery")
    open_item(page, "q")
    said = page.locator(".story > p").all_inner_texts()
    assert said[:3] == ["<image> A dot?", "It is.", "Which colour?"]


def test_an_input_leads_to_the_job_that_made_it(opened: Opened, tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", [make_job("parent"), child("edited", "parent")])
    make_gallery([root], root / "gallery")
    page = opened.page(root / "gallery")
    open_item(page, "edited")
    page.locator(".panel").get_by_role("button", name="Input 1: parent").click()
    page.wait_for_selector(".bar .id:has-text('parent')")
    assert page.url.endswith("parent")


def test_a_failure_shows_its_message_and_traceback(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    assert "ValueError" in page.inner_text('.tile[data-item="broken"]')
    open_item(page, "broken")
    assert page.inner_text(".failure h2") == "Failed: ValueError"
    assert page.inner_text(".failure .message") == "NaN in the output"
    assert "ValueError: NaN in the output" in page.inner_text(".failure pre")


def test_compared_images_zoom_together_and_differences_are_marked(
    opened: Opened, night: Path
) -> None:
    page = opened.page(night / "gallery")
    page.locator('.tile[data-item="red-1"]').focus()
    for key in ("Space", "ArrowRight", "Space", "ArrowRight", "ArrowRight", "Space", "c"):
        page.keyboard.press(key)
    assert page.locator(".frame .id").all_inner_texts() == ["red-1", "red-2", "green-1"]
    rows = page.locator(".differences tbody tr").all_inner_texts()
    assert {"Prompt\ta red dot\ta red dot\ta green dot", "Seed\t1\t2\t1"} <= set(rows)
    assert not any(row.startswith("Num steps") for row in rows)
    page.get_by_label("Only what differs").uncheck()
    marked = page.locator(".differences tr.differs").count()
    assert marked == len(rows) < page.locator(".differences tbody tr").count()
    page.get_by_role("button", name="Zoom in").click()
    page.mouse.move(300, 300)
    page.mouse.wheel(0, -200)
    planes = "[...document.querySelectorAll('.plane')].map((node) => node.style.transform)"
    page.wait_for_function(f"() => {planes}.every((one) => !one.includes('scale(1.5)'))")
    assert len(set(page.evaluate(planes))) == 1
    again = opened.page(night / "gallery", page.url.partition("#")[2])
    assert again.locator(".frame").count() == 3


def test_axes_lay_out_matrix_values_by_seeds(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery", "view=axes")
    table = page.locator(".axes-table")
    assert table.locator("thead th").all_inner_texts() == ["colour \\ Seed", "1", "2", "3"]
    assert table.locator("tbody th").all_inner_texts() == ["green", "red"]
    page.locator('.cell[aria-label="red-3"]').click()
    assert page.inner_text(".bar .id") == "red-3"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Swap rows and columns").click()
    assert table.locator("tbody th").all_inner_texts() == ["1", "2", "3"]
    page.select_option("[aria-label=Columns]", "")
    cell = page.locator("td", has=page.locator('.cell[aria-label="red-2"]'))
    assert cell.locator(".more").inner_text() == "+1"
    # What varies within a cell can be fixed.
    page.select_option("[aria-label=colour]", label="green")
    assert page.locator('.cell[aria-label="green-2"]').count() == 1
    assert page.locator(".more").count() == 0


def test_a_cell_of_axes_shows_all_that_it_has(opened: Opened, tmp_path: Path) -> None:
    prompts = ['a "dot" & <b>', "a line"]
    jobs = [make_job(f"{n}-{s}", prompt=prompts[n], seed=s) for n in range(2) for s in range(3)]
    root = make_run(tmp_path / "run", jobs)
    make_gallery([root], root / "gallery")
    page = opened.page(root / "gallery", "view=axes&rows=prompt&columns=")
    cell = page.locator("td", has=page.locator('.cell[aria-label="0-0"]'))
    cell.locator(".more").click()
    assert ids(page) == ["0-0", "0-1", "0-2"]
    page.go_back()
    assert page.locator(".axes-table").count() == 1


def test_axes_compare_runs_with_equal_ids(opened: Opened, tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("plain", "lora")]
    for number, root in enumerate(roots):
        make_run(root, [make_job(f"s{seed}", seed=seed + 10 * number) for seed in (1, 2)])
    make_gallery(roots, tmp_path / "both")
    page = opened.page(tmp_path / "both", "view=axes&rows=run&columns=prompt")
    assert page.locator(".axes-table tbody th").all_inner_texts() == ["lora", "plain"]
    page.locator('.cell[aria-label="s2"]').first.click()
    page.wait_for_function("() => document.querySelector('.layer img').naturalWidth === 64")
    source = page.locator(".layer img").get_attribute("src")
    assert source == "../lora/images/s2.png"
    page.keyboard.press("k")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Images").click()
    assert page.locator('.tile[data-pick="keep"]').count() == 1


def test_a_gallery_that_was_moved_shows_thumbnails_and_says_so(
    opened: Opened, night: Path, tmp_path: Path
) -> None:
    shutil.copytree(night / "gallery", tmp_path / "elsewhere" / "moved")
    opened.expects_missing = True
    page = opened.page(tmp_path / "elsewhere" / "moved")
    open_item(page, "red-1")
    page.wait_for_selector(".stage-note:not([hidden])")
    assert "this is its thumbnail" in page.inner_text(".stage-note")
    assert "images/red-1.png" in page.inner_text(".stage-note")
    assert page.locator(".under").count() == 1


def test_a_gallery_made_again_under_an_open_page_asks_for_a_reload(
    opened: Opened, tmp_path: Path
) -> None:
    root = make_run(tmp_path / "run", [make_job("a")])
    make_gallery([root], root / "gallery")
    page = opened.page(root / "gallery")
    make_run(root, [make_job("a"), make_job("b")])
    make_gallery([root], root / "gallery")
    opened.expects_missing = True
    open_item(page, "a")
    page.wait_for_selector(".panel .warning")
    assert "reload the page" in page.inner_text(".panel .warning")


def test_jobs_to_come_are_counted(opened: Opened, tmp_path: Path) -> None:
    run_folder(tmp_path / "run", [make_job(f"j{n}") for n in range(8)], stop=Flag(after=2))
    made = make_gallery([tmp_path / "run"], tmp_path / "run" / "gallery")
    page = opened.page(tmp_path / "run" / "gallery")
    assert page.inner_text("#count") == f"{made.items} items ({made.pending} to come)"


def test_only_the_tiles_in_view_exist(opened: Opened, tmp_path: Path) -> None:
    make_synthetic(tmp_path / "many", 1200)
    page = opened.page(tmp_path / "many")
    assert page.inner_text("#count") == "1,200 items"
    assert 10 < page.locator(".tile").count() < 150
    page.locator(".tile").first.focus()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.item") == "item-001199"
    assert page.locator(".tile").count() < 150
    page.evaluate("document.getElementById('scroller').scrollTop = 0")
    page.wait_for_selector('.tile[data-item="item-000000"]')
    _search(page, "status:failed")
    assert page.inner_text("#count") == "2 of 1,200 items"
    page.set_viewport_size({"width": 500, "height": 800})
    assert page.locator(".tile").count() == 2


def test_figures_are_filtered_by_a_range(opened: Opened, tmp_path: Path) -> None:
    make_synthetic(tmp_path / "many", 300)
    page = opened.page(tmp_path / "many")
    page.locator('[data-column="total_s"] summary').click()
    page.get_by_label("Total, at least").fill("50")
    page.keyboard.press("Enter")
    page.wait_for_selector("#header .chip")
    few = page.inner_text("#count")
    totals = page.evaluate("[...SB.items.byName.get('total_s').numbers].filter((s) => s >= 50)")
    assert few == f"{len(totals)} of 300 items"
    # Bytes are written in GiB.
    page.locator('[data-column="peak_allocated_bytes"] summary').click()
    page.get_by_label("Peak allocated, at most").fill("15")
    page.keyboard.press("Enter")
    page.wait_for_function("(few) => document.getElementById('count').textContent !== few", arg=few)
    bytes_from = page.evaluate(
        "new URLSearchParams(location.hash.slice(1)).get('n.peak_allocated_bytes')"
    )
    assert bytes_from == f"-Infinity..{15 * 2**30}"
    again = opened.page(tmp_path / "many", page.url.partition("#")[2])
    assert again.inner_text("#count") == page.inner_text("#count")


def test_the_report_has_the_figures_of_the_summary(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    page.get_by_role("button", name="Report").click()
    page.wait_for_selector(".report .tiles")
    total = summarise(read_log(night / "log.parquet")).total
    tiles = page.locator(".tiles > div").all_inner_texts()
    assert f"Images\n{total.images}\nin {total.calls} batches" in tiles
    # Every plot has its numbers beside it.
    plots = page.locator(".plot-and-numbers")
    assert plots.count() >= 4
    assert plots.filter(has=page.locator(".numbers td")).count() == plots.count()
    assert page.locator(".report", has_text="NaN in the output").count() == 1
    row = page.locator("tr", has_text="NaN in the output")
    row.get_by_role("button", name="Show").click()
    assert ids(page) == ["broken"]


def _views(night: Path) -> list[str]:
    run = _run_id(night)
    items = [f"item={run}/{name}" for name in ("edited", "story", "broken")]
    return ["", "view=axes", "view=report", *items, f"compare={run}/red-1&compare={run}/red-2"]


def _show(page: Any, view: str) -> None:
    """Goes to a view as the browser's own back and forward do."""
    page.evaluate("(view) => { location.hash = view; }", view)
    shown = {"": ".tile", "view=axes": ".axes-table", "view=report": ".report .tiles"}
    page.wait_for_selector(shown.get(view, "dialog.viewer .facts"))


def test_everything_that_can_be_used_has_a_name(opened: Opened, night: Path) -> None:
    nameless = """[...document.querySelectorAll("button, input, select, a, [tabindex='0']")]
      .filter((node) => node.checkVisibility() && !(node.ariaLabel || node.textContent.trim()
        || node.labels?.length || node.title)).map((node) => node.outerHTML)"""
    page = opened.page(night / "gallery")
    for view in _views(night):
        _show(page, view)
        assert page.evaluate(nameless) == [], view


def test_the_page_fits_a_phone_in_light_and_dark(opened: Opened, night: Path) -> None:
    page = opened.page(night / "gallery")
    page.set_viewport_size({"width": 390, "height": 800})
    for view in _views(night):
        _show(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            ink, paper = (
                page.evaluate(f"getComputedStyle(document.body).{name}")
                for name in ("color", "backgroundColor")
            )
            levels = [sum(map(int, one[4:-1].split(", "))) / 3 for one in (ink, paper)]
            assert (levels[0] > levels[1]) is (scheme == "dark")
            assert abs(levels[0] - levels[1]) > 150


def test_filters_are_a_drawer_on_a_phone(opened: Opened, night: Path) -> None:
    page = opened.context.new_page()
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto((night / "gallery" / "index.html").as_uri())
    page.wait_for_selector("html[data-complete]", state="attached")
    assert not page.locator("#facets").is_visible()
    page.click("#filters")
    page.locator('[data-column="task"]').get_by_label("edit").check()
    page.get_by_role("button", name="Close the filters").click()
    assert not page.locator("#facets").is_visible()
    assert ids(page) == ["edited"]
