"""Help is complete and the README's command lines are real."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sensebatch.cli.main import app
from tests.cli.conftest import Invoke

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _commands(group: Any = None, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields every command, those of sub-commands too, with its name."""
    group = typer.main.get_command(app) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*prefix, name))
        else:
            yield " ".join((*prefix, name)), command


COMMANDS = dict(_commands())


def _documented() -> list[list[str]]:
    """Returns the arguments of each `sensebatch` line in the documents' code blocks."""
    return [
        shlex.split(line)[1:]
        for path in DOCUMENTS
        for block in FENCE.findall(path.read_text(encoding="utf-8"))
        for line in block.splitlines()
        if line.startswith("sensebatch ")
    ]


def test_the_commands_are_those_that_scripts_know() -> None:
    assert set(COMMANDS) == {
        "run", "plan", "status", "report", "t2i", "edit", "interleave", "ask",
        "manifest validate", "manifest schema", "manifest convert", "model inspect",
        "calibrate", "profile", "doctor", "demo", "repair", "merge", "jobs", "show", "prune",
        "hash", "export", "gallery",
    }  # fmt: skip


def test_help_names_both_ends_of_the_guidance_interval(invoke: Invoke) -> None:
    lines = invoke("t2i", "--help").out.splitlines()
    (line,) = (line for line in lines if "--cfg-interval" in line)
    assert re.search(r"--cfg-interval +FROM TO ", line)


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        (["run", "a.yaml", "--output", "b"], "; did you mean --output-dir?"),
        (["t2i", "--out", "b"], "; did you mean --output?"),
        (["run", "a.yaml", "--batch_size", "2"], "; did you mean --max-batch-size?"),
        (["run", "a.yaml", "--modle", "b"], "; did you mean --model?"),
        (["run", "a.yaml", "--steps", "2"], "; num_steps is a field of the manifest's jobs"),
        (["run", "a.yaml", "--num-stps", "2"], "; num_steps is a field of the manifest's jobs"),
        (["manifest", "convert", "--width", "2"], "; width is a field of the manifest's jobs"),
        (["t2i", "--guidance", "2"], "; did you mean --cfg-scale?"),
        (["t2i", "--negative-prompt", "b"], "; there are no negative prompts: say what to show, "),
        (["run", "a.yaml", "--resume"], "; the same command resumes a run"),
        (["status", "a", "--width", "2"], ""),
        (["run", "a.yaml", "--something"], ""),
    ],
)
def test_unknown_option_is_answered_with_what_helps(
    invoke: Invoke, args: list[str], advice: str
) -> None:
    ended = invoke(*args)
    assert ended.code == 2
    line, see = ended.err.splitlines()
    assert re.search(
        rf": expected an option of sensebatch \w.*, found --[-\w]+{re.escape(advice)}", line
    )
    assert (";" in line) == bool(advice)
    assert see.startswith("see sensebatch ")


def test_wrong_value_is_reported_with_the_name_of_its_option(invoke: Invoke) -> None:
    ended = invoke("manifest", "validate", "a.yaml", "--max-image-pixels", "0")
    assert ended.code == 2
    assert "--max-image-pixels: expected a number greater than 0, found 0" in ended.err


@pytest.mark.parametrize("args", [["run", "a.yaml"], ["manifest", "validate", "a.yaml"]])
def test_a_wrong_word_is_reported_in_our_own_words(invoke: Invoke, args: list[str]) -> None:
    ended = invoke(*args, "--vram-mode", "quick")
    assert ended.code == 2
    expected = "--vram-mode: expected auto, full, fast, balanced or low, found 'quick'"
    assert ended.err.startswith(f"sensebatch: {expected}\n")


@pytest.mark.parametrize(
    "args",
    [
        ["run", "a.yaml", "--output-dir", ""],
        ["run", "a.yaml", "--output-dir="],
        ["run", "a.yaml", "--output-dir", " "],
        ["run", ""],
        ["run", "a.yaml", "--config", ""],
        ["t2i", "--prompt", "a", "--output", ""],
        ["t2i", "--jsonl", ""],
        ["status", ""],
        ["report", ""],
        ["export", "hf", "", "out"],
        ["merge", ""],
        ["plan", ""],
        ["profile", "--report", ""],
        ["manifest", "convert", "", "b.yaml"],
        ["manifest", "validate", ""],
    ],
)
def test_empty_path_is_not_the_current_folder(invoke: Invoke, args: list[str]) -> None:
    ended = invoke(*args)
    assert ended.code == 2
    assert ": expected a path, found an empty text\n" in ended.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name}: {parameter.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_budgets_are_given_either_way_everywhere(name: str) -> None:
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert ("--vram-budget" in options) == ("--max-memory" in options)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_printed_with_exit_code_0(invoke: Invoke, name: str) -> None:
    ended = invoke(*name.split(), "--help")
    assert ended.code == 0
    assert "Usage: sensebatch" in ended.out
    # Bounds of numbers are in words.
    assert not re.search(r"\[[^]]*x[<>]=?", ended.out)


@pytest.mark.parametrize("name", ["", "manifest", "model", *COMMANDS])
@pytest.mark.parametrize("width", [80, 60])
def test_help_fits_and_cuts_no_name(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = invoke(*name.split(), "--help").out.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    words = " ".join(lines).split()
    for parameter in COMMANDS[name].params if name in COMMANDS else ():
        shown = set(words) | {word.rstrip(",") for word in words}
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert {*parameter.opts, *parameter.secondary_opts} <= shown


DEFAULTS = {
    "run": {"--max-batch-size": "16", "--image-format": "png", "--model": "tiny"},
    "t2i": {"--num-steps": "50; tiny: 8", "--cfg-interval": "0.0 1.0", "--seed": "42"},
    "edit": {"--input-max-pixels": "auto; tiny: none", "--img-cfg-scale": "1.0"},
    "interleave": {"--think": "on; tiny: off", "--max-images": "10"},
    "demo": {"--output-dir": "outputs/catalog"},
}


@pytest.mark.parametrize(
    ("command", "option", "default"),
    [(command, *item) for command, found in DEFAULTS.items() for item in found.items()],
)
def test_help_shows_the_default_of_a_setting(command: str, option: str, default: str) -> None:
    found = COMMANDS[command]
    context = found.make_context(command, [], resilient_parsing=True)
    (parameter,) = (item for item in found.params if option in item.opts)
    _, words = parameter.get_help_record(context)
    assert words.endswith(f"[default: {default}]")


@pytest.mark.parametrize("name", ["manifest validate", "manifest convert"])
def test_commands_list_only_the_options_that_change_what_they_do(
    invoke: Invoke, manifest: Path, name: str
) -> None:
    shown = set(re.findall(r"--[a-z][a-z-]+", invoke(*name.split(), "--help").out))
    own = {"--json"} if name == "manifest validate" else {"--embed-images", "--overwrite"}
    both = {"--config", "--model", "--model-path", "--max-image-pixels", "--task", "--help"}
    assert shown == both | own
    # The options of the run are taken all the same.
    target = [] if name == "manifest validate" else ["out.jsonl"]
    assert invoke(*name.split(), manifest, *target, "--dtype", "float32").code == 0


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("sensebatch sta", {"status"}),
        ("sensebatch manifest ", {"validate", "schema", "convert"}),
        ("sensebatch run --vram-m", {"--vram-mode"}),
        ("sensebatch run --vram-mode b", {"balanced"}),
    ],
)
def test_shells_complete_commands_options_and_words(typed: str, expected: set[str]) -> None:
    environment = {
        **os.environ,
        "_SENSEBATCH_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
        "PYTHONPATH": str(ROOT),
    }
    shown = subprocess.run(
        [sys.executable, "-m", "sensebatch"], env=environment, capture_output=True, text=True
    )
    assert set(shown.stdout.split()) == expected


@pytest.mark.parametrize("args", _documented(), ids=" ".join)
def test_documented_command_lines_parse(args: list[str]) -> None:
    size = 2 if args[0] in ("manifest", "model") else 1
    command = COMMANDS[" ".join(args[:size])]
    context = typer.main.get_command(app).make_context(
        "sensebatch", [args[0]], resilient_parsing=True
    )
    command.make_context(args[size - 1], args[size:], parent=context)


def test_the_readme_documents_every_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"sensebatch {name}" not in readme] == []


def _anchors(path: Path) -> set[str]:
    """Returns what a link to a heading of a document may say after `#`, as GitHub forms it."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text("utf-8")), re.MULTILINE):
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    repeated = {f"{name}-{n}" for name, last in found.items() for n in range(1, last + 1)}
    return {*found, *repeated}


OTHER_OPTIONS = {
    "--help", "--install-completion", "--show-completion",
    "--torch-backend",  # uv
    "--signal",  # Slurm
    "--kill", "--cpu",  # sensebatch.profile.scaling
    "--batch", "--image-side",  # tests.executor.scale
    "--session-minutes", "--through-run", "--first",  # sensebatch.tiny
}  # fmt: skip
PAGES = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)#]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8"))
    for target, anchor in links:
        linked = path.parent / target if target else path
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), f"{target}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_options_named_in_prose_exist(path: Path) -> None:
    parameters = [item for command in COMMANDS.values() for item in command.params]
    taken = {name for item in parameters for name in (*item.opts, *item.secondary_opts)}
    prose = FENCE.sub("", path.read_text(encoding="utf-8"))
    for code in re.findall(r"`([^`]+)`", prose):
        if re.match("--[a-z]|sensebatch ", code):
            named = re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
            assert {name.replace("_", "-") for name in named} <= taken | OTHER_OPTIONS, code


def test_help_can_be_shown_where_only_ascii_can() -> None:
    script = "from sensebatch.cli.main import main; main(['run', '--help'])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    shown = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, check=True
    )
    assert b"--output-dir" in shown.stdout
