"""t2i, edit and interleave: the published command lines as they stand."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sensebatch.checkpoint.files import TINY_FOLDER
from sensebatch.cli import one_job
from sensebatch.settings import resolve_settings
from sensebatch.store.images import read_metadata
from tests.backends import FakeBackend
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.usefixtures("backend")

SMALL = ["--width", "64", "--height", "32", "--num_steps", "2"]


def _opened(path: str) -> Image.Image:
    return Image.open(io.BytesIO(Path(path).read_bytes()))


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def test_output_is_where_the_user_asked(invoke: Invoke) -> None:
    ended = invoke("t2i", "--prompt", "a dot", "--output", "deep/dot.png", *SMALL)
    assert ended.code == 0
    assert _opened("deep/dot.png").size == (64, 32)
    assert "wrote deep/dot.png\n" in ended.err


def test_published_t2i_command_line(invoke: Invoke) -> None:
    ended = invoke(
        "t2i", "--model_path", "tiny", "--prompt", "a dot", "--output", "dot.png",
        "--width", "64", "--height", "32", "--cfg_scale", "4.0", "--cfg_norm", "cfg_zero_star",
        "--cfg_interval", "0", "1", "--timestep_shift", "3.0", "--num_steps", "2",
        "--seed", "7", "--think", "--print_think", "--profile", "--dtype", "float32",
        "--device", "cpu", "--compare",
    )  # fmt: skip
    assert ended.code == 0
    assert "thinking in " in ended.out
    assert "throughput " in ended.out
    embedded = read_metadata(_opened("dot.png"))
    assert embedded is not None
    assert embedded["sampling"]["cfg_norm"] == "cfg_zero_star"
    assert (embedded["seed"], embedded["think"]) == (7, True)
    assert Path("dot_compare.png").is_file()


def test_published_edit_command_line_with_two_images(invoke: Invoke, red: Path) -> None:
    ended = invoke(
        "edit", "--prompt", "both", "--image", red, "--image", red, "--output_dir", "out",
        "--stem", "both", "--img_cfg_scale", "1.5", "--target_pixels", "4096",
        "--input_max_pixels", "none", "--system_message", "Draw.", "--compare", "--json",
    )  # fmt: skip
    assert ended.code == 0
    assert ended.json["outputs"] == ["out/both.png", "out/both_compare.png"]
    embedded = read_metadata(_opened("out/both.png"))
    assert embedded is not None
    assert embedded["system_prompt"] == "Draw."
    assert embedded["sampling"]["img_cfg_scale"] == 1.5
    assert embedded["input_max_pixels"] is None
    compared = _opened("out/both_compare.png")
    assert b"compositeWithTrainedAlgorithmicMedia" in compared.info["xmp"]
    assert compared.width > 3 * _opened("out/both.png").width


def test_a_comparison_shows_its_inputs_as_the_job_used_them(invoke: Invoke) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (640, 32)).save("turned.jpg", exif=exif)
    widths = []
    for raw in ("--no-raw-inputs", "--raw-inputs"):
        ended = invoke(
            "edit", "--prompt", "x", "--image", "turned.jpg", "--output", f"out{raw}.png", *SMALL,
            "--compare", raw,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        widths.append(_opened(f"out{raw}_compare.png").width)
    # At the height of the output, 32 pixels, the input is 2 wide upright and 640 as stored.
    assert widths[1] - widths[0] == 640 - 2


def test_interleave_writes_numbered_images_and_the_text(invoke: Invoke) -> None:
    ended = invoke(
        "interleave", "--prompt", "a story", "--stem", "story", "--max_images", "2",
        "--max_new_tokens", "9", "--no_think", "--resolution", "64x32", "--json",
    )  # fmt: skip
    outputs = ended.json["outputs"]
    assert outputs[0] == "outputs/interleave/story_0.png"
    assert outputs[-1] == "outputs/interleave/story.txt"
    assert all(Path(path).is_file() for path in outputs)


def test_same_command_again_draws_nothing_and_restores_the_file(
    invoke: Invoke, backend: FakeBackend
) -> None:
    command = ["t2i", "--prompt", "a dot", "--output", "dot.png", *SMALL]
    invoke(*command)
    before = Path("dot.png").read_bytes()
    Path("dot.png").unlink()
    assert invoke(*command).code == 0
    assert Path("dot.png").read_bytes() == before
    assert len(backend.loaded) == 1


def test_without_a_name_different_jobs_and_models_get_different_files(invoke: Invoke) -> None:
    shutil.copytree(TINY_FOLDER, "copy")
    first = invoke("t2i", "--prompt", "a dot", *SMALL, "--json").json["outputs"]
    second = invoke("t2i", "--prompt", "a line", *SMALL, "--json").json["outputs"]
    third = invoke("t2i", "--prompt", "a line", "--seed", "2", *SMALL, "--json").json["outputs"]
    fourth = invoke(
        "t2i", "--prompt", "a line", "--seed", "2", "--model", "./copy", *SMALL, "--json"
    )
    assert len({*first, *second, *third, *fourth.json["outputs"]}) == 4


@pytest.mark.parametrize(
    ("task", "prompt", "name"),
    [
        ("interleave", "Show a STAR, growing; in three!", "show-a-star-growing-in-three"),
        ("t2i", "a " * 30, "-".join("a" * 20)),
        ("t2i", "x" * 50, "t2i"),
        ("t2i", "Ein Häuschen, 3 Türme", "ein-häuschen-3-türme"),
        ("t2i", "...", "t2i"),
    ],
)  # fmt: skip
def test_without_a_name_files_are_named_after_the_prompt(
    invoke: Invoke, task: str, prompt: str, name: str
) -> None:
    (path, *_) = invoke(task, "--prompt", prompt, *SMALL, "--json").json["outputs"]
    assert re.fullmatch(rf"outputs/{task}/{name}-[0-9a-f]{{12}}(_0)?.png", path)


def test_run_of_an_earlier_version_keeps_its_name(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["t2i", "--prompt", "a dot", *SMALL, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(one_job, "HASH_DIGITS", one_job.STEM_DIGITS)
        (path,) = invoke(*command).json["outputs"]
    before = f"t2i-{Path(path).stem.rpartition('-')[2]}"
    invoke(*command, "--stem", before)
    again = invoke(*command).json
    assert again["outputs"] == [f"outputs/t2i/{before}.png"]
    assert again["this_run"]["done"] == 0


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["edit", "--image", "in.png", "--output", "in.png"], "in.png"),
        (["edit", "--image", "./in.png", "--output-dir", ".", "--stem", "IN"], "in.png"),
        (["edit", "--image", "a_compare.png", "--output", "a.png", "--compare"], "a_compare.png"),
        (["interleave", "--image", "a_0.png", "--output-dir", ".", "--stem", "a"], "a_0.png"),
    ],
)
def test_input_image_is_not_overwritten(
    invoke: Invoke, red: Path, backend: FakeBackend, command: list[str], output: str
) -> None:
    target = red.with_name(output)
    target.write_bytes(red.read_bytes())
    before = target.read_bytes()
    ended = invoke(*command, "--prompt", "blue")
    assert ended.code == 2
    assert "--output: expected a file other than the input image, found " in ended.err
    assert target.read_bytes() == before
    assert backend.loaded == []


def test_input_image_is_not_overwritten_through_a_link(invoke: Invoke, red: Path) -> None:
    before = red.read_bytes()
    red.parent.joinpath("links").mkdir()
    red.parent.joinpath("links/other.png").symlink_to(red)
    ended = invoke("edit", "--image", "links/other.png", "--output", red.name, "--prompt", "blue")
    assert ended.code == 2
    assert "found links/other.png, which would be overwritten" in ended.err
    assert red.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["t2i", "--output", "a.png"], "a.png"),
        (["t2i", "--output-dir", ".", "--stem", "A"], "a.png"),
        (["t2i", "--output", "a.png", "--compare"], "a_compare.png"),
        (["interleave", "--output-dir", ".", "--stem", "a"], "a_7.png"),
        (["interleave", "--output-dir", ".", "--stem", "a"], "a.txt"),
    ],
)
def test_file_that_something_else_wrote_is_replaced_only_if_asked(
    invoke: Invoke, backend: FakeBackend, command: list[str], name: str
) -> None:
    Path(name).write_bytes(b"mine")
    command = [*command, "--prompt", "a dot", *SMALL]
    ended = invoke(*command)
    assert ended.code == 2
    assert f"{name}: expected no file, or one that this command wrote, found" in ended.err
    assert Path(name).read_bytes() == b"mine"
    assert backend.loaded == []
    assert invoke(*command, "--overwrite").code == 0


def test_file_that_a_command_does_not_write_stays_beside_its_own(invoke: Invoke) -> None:
    for name in ("a_0.png", "a_compare.png", "a.txt", "a.webp"):
        Path(name).write_bytes(b"mine")
    assert invoke("t2i", "--output", "a.png", "--prompt", "a dot", *SMALL).code == 0
    assert Path("a_0.png").read_bytes() == Path("a_compare.png").read_bytes() == b"mine"


def test_command_replaces_its_own_file_until_somebody_edits_it(invoke: Invoke) -> None:
    def draw(prompt: str) -> int:
        return invoke("t2i", "--output", "a.png", "--prompt", prompt, *SMALL, "--compare").code

    assert draw("a dot") == 0
    first = Path("a.png").read_bytes()
    assert draw("a line") == 0
    second = Path("a.png").read_bytes()
    assert second != first
    # As a run that was killed before it had copied its image leaves it.
    Path("a.png").write_bytes(first)
    assert draw("a line") == 0
    assert Path("a.png").read_bytes() == second
    Path("a.png").write_bytes(b"edited")
    assert draw("a line") == 2
    assert Path("a.png").read_bytes() == b"edited"


@pytest.mark.parametrize(("flags", "warns"), [([], True), (["--think"], False)])
def test_text_that_was_not_written_is_not_printed_in_silence(
    invoke: Invoke, flags: list[str], warns: bool
) -> None:
    ended = invoke("t2i", "--prompt", "a dot", "--print-think", *SMALL, *flags)
    assert ended.code == 0
    assert ("warning: --print-think: the job wrote no text" in ended.err) is warns


def test_one_job_prints_little(invoke: Invoke) -> None:
    ended = invoke("t2i", "--prompt", "a dot", "--output", "dot.png", "--resolution", "1:1")
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in ended.err.splitlines()]
    assert lines == ["loading tiny on cpu (float32)", "wrote dot.png"]
    again = invoke("t2i", "--prompt", "a dot", "--output", "dot.png", "--resolution", "1:1")
    assert again.err == "unchanged: dot.png, which was there already\n"
    Path("dot.png").unlink()
    back = invoke("t2i", "--prompt", "a dot", "--output", "dot.png", "--resolution", "1:1")
    assert back.err == "wrote dot.png\n"


def test_a_failed_job_is_explained(invoke: Invoke) -> None:
    ended = invoke("t2i", "--prompt", "this fails", "--output", "dot.png", *SMALL)
    assert "failed: dot: ValueError: NaN in the output" in ended.err
    assert "0 of 1 job done, 1 failed" in ended.err
    assert "--retry-failed" in ended.err


@pytest.mark.parametrize(
    ("name", "kind"), [("a.webp", "WEBP"), ("a.jpg", "JPEG"), ("a.jpeg", "JPEG")]
)
def test_suffix_of_the_output_says_the_format(invoke: Invoke, name: str, kind: str) -> None:
    assert invoke("t2i", "--prompt", "a dot", "--output", name, *SMALL).code == 0
    assert _opened(name).format == kind


def test_failed_job_writes_nothing_and_gives_exit_code_1(invoke: Invoke) -> None:
    ended = invoke("t2i", "--prompt", "this fails", "--output", "dot.png", *SMALL)
    assert ended.code == 1
    assert not Path("dot.png").exists()


def test_jsonl_is_a_run_whose_rows_win_over_flags(invoke: Invoke, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "a dot", "seed": 3},
        {"id": "b", "prompt": "a line", "width": 32, "height": 32},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ended = invoke(
        "t2i", "--jsonl", path, "--output_dir", "out", *SMALL, "--seed", "9", "--compare"
    )
    assert ended.code == 0
    embedded = [read_metadata(_opened(f"out/images/{name}.png")) for name in ("a", "b")]
    assert [values and values["seed"] for values in embedded] == [3, 9]
    assert [_opened(f"out/images/{name}.png").width for name in ("a", "b")] == [64, 32]
    assert Path("out/compare/a.png").is_file()
    assert resolve_settings(config_file=Path("out/run.yaml")).memory.max_batch_size == 16


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["t2i"], "expected --prompt or --jsonl, found neither"),
        (["t2i", "--prompt", "a", "--jsonl", "b"], "--prompt: cannot be combined with --jsonl"),
        (["t2i", "--prompt", "a", "--width", "33", "--height", "32"], "--width: "),
        (
            ["t2i", "--prompt", "a", "--num-steps", "0"],
            "--num-steps: expected a number of at least 1",
        ),
        (["t2i", "--prompt", "a", "--output", "a.gif"], "--output: expected a file that ends in"),
        (
            ["t2i", "--prompt", "a", "--output", "a.png", "--stem", "b"],
            "--stem: cannot be combined with --output",
        ),
        (["t2i", "--prompt", "a", "--stem", "../b"], "--stem: "),
        (["t2i", "--prompt", "a", "--stem", "con"], "--stem: "),
        (["t2i", "--prompt", "a", "--output", "con.png"], "--output: "),
        (["t2i", "--prompt", "a", "--output", "a:b.png"], "--output: "),
        (["edit", "--prompt", "a"], "--image: expected at least one input image"),
        (["edit", "--prompt", "a", "--image", "none.png"], "--image: "),
        (["edit", "--jsonl", "b", "--width", "32"], "--jsonl: expected the sizes of edits"),
        (["t2i", "--jsonl", "b", "--width", "32"], "expected either --resolution or both"),
        (["t2i", "--prompt", "a", "--cfg-interval", "0", "2"], "--cfg-interval: expected a number"),
        (
            ["t2i", "--prompt", "a", "--cfg-interval", "0.9", "0.1"],
            "--cfg-interval: expected the lower end first, found 0.9 before 0.1",
        ),
    ],
)
def test_mistake_names_the_option(
    invoke: Invoke, backend: FakeBackend, args: list[str], message: str
) -> None:
    ended = invoke(*args)
    assert ended.code == 2
    assert ended.err.startswith(f"sensebatch: {message}")
    assert backend.loaded == []


def test_t2i_has_no_guidance_by_images(invoke: Invoke) -> None:
    assert invoke("t2i", "--prompt", "a", "--img_cfg_scale", "2").code == 2
