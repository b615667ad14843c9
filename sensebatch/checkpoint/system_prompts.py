"""Where the run's system prompts come from, in order of preference. Executes nothing it reads.

A job's own `system_prompt` takes precedence over all of these, and is not looked at here.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sensebatch.bounded import is_unicode, quoted, read_file, shown
from sensebatch.checkpoint.files import Checkpoint, read_json, visible_files
from sensebatch.config import TINY_MODEL
from sensebatch.errors import CheckpointError
from sensebatch.tasks import SystemPromptKind, Task

CONSTANTS = {
    SystemPromptKind.GENERATION: "SYSTEM_MESSAGE_FOR_GEN",
    SystemPromptKind.INTERLEAVE: "DEFAULT_SYSTEM_MESSAGE",
}
"""Their names in the upstream release's Python files."""

BUILT_IN = "built-in"
"""The source of a prompt written for this project."""
NO_PROMPT = "none"
"""The source of the system prompt of a task that has none."""

MAX_SOURCE_BYTES = 2**19
"""Largest Python file that is searched; one that holds prompts is far smaller."""
MAX_FILES = 1000
"""Most Python files that are searched."""
MAX_PARSED_BYTES = 2**21
"""Most Python that is parsed in all."""

_BUILT_IN_FILE = Path(__file__).with_name("prompts.json")
_PACKAGE = "sensenova_u1"


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemPrompt:
    """The system prompt of a task."""

    text: str
    source: str
    """For the log: the file it was read from, or `built-in`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemPrompts:
    """The system prompts of a run."""

    by_kind: Mapping[SystemPromptKind, SystemPrompt]
    warn_built_in: bool
    """Whether a checkpoint gets a built-in prompt although it was trained with another one."""

    @property
    def longest_bytes(self) -> int:
        """Length of the longest, in bytes of UTF-8."""
        return max(len(prompt.text.encode()) for prompt in self.by_kind.values())

    def of_task(self, task: Task) -> SystemPrompt:
        """Returns the system prompt of a task; an empty one where the task has none."""
        kind = task.spec.prompt.system
        return SystemPrompt(text="", source=NO_PROMPT) if kind is None else self.by_kind[kind]

    @property
    def sources(self) -> dict[Task, str]:
        """Where the system prompt of each task was found, for the log."""
        return {task: self.of_task(task).source for task in Task}


def resolve_system_prompts(checkpoint: Checkpoint, file: str | Path | None = None) -> SystemPrompts:
    """Returns the system prompts of a run.

    Each of the two kinds (generation, interleave) is searched for separately, in this order: the
    file named in the configuration, the checkpoint folder's Python files, an installed
    `sensenova_u1` package, the built-in texts.

    Args:
        checkpoint: Its folder may hold the upstream Python files.
        file: JSON with `generation`, `interleave` or both; None where none is named.

    Raises:
        CheckpointError: The named file cannot be used.
    """
    prompts = {} if file is None else _from_json(Path(file))
    wanted = {kind: name for kind, name in CONSTANTS.items() if kind not in prompts}
    for files in (visible_files(checkpoint.path, "*.py"), _package_files()):
        constants = _constants(files, set(wanted.values()))
        for kind, name in wanted.items():
            if kind not in prompts and name in constants:
                prompts[kind] = constants[name]
    built_in = _from_json(_BUILT_IN_FILE)
    for kind in CONSTANTS.keys() - prompts.keys():
        prompts[kind] = SystemPrompt(text=built_in[kind].text, source=BUILT_IN)
    return SystemPrompts(
        by_kind={kind: prompts[kind] for kind in SystemPromptKind},
        warn_built_in=checkpoint.name != TINY_MODEL
        and not checkpoint.synthetic
        and any(prompt.source == BUILT_IN for prompt in prompts.values()),
    )


def _from_json(file: Path) -> dict[str, SystemPrompt]:
    values = read_json(file)
    kinds = " and ".join(CONSTANTS)
    if not values:
        raise CheckpointError(f"{file}: expected a JSON object with {kinds}")
    for kind, text in values.items():
        if kind not in CONSTANTS:
            raise CheckpointError(f"{file}: {shown(kind)}: expected only {kinds}")
        if not isinstance(text, str):
            raise CheckpointError(f"{file}: {kind}: expected a string, found {quoted(text)}")
    return {kind: SystemPrompt(text=text, source=str(file)) for kind, text in values.items()}


def _package_files() -> list[Path]:
    """Returns the installed package's Python files; finding it does not import it."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return sorted(file for folder in folders for file in Path(folder).rglob("*.py"))


def _constants(files: Iterable[Path], names: set[str]) -> dict[str, SystemPrompt]:
    """Returns the string constants of some names; the first file that has one wins.

    The files are somebody else's code: one that cannot be read holds no prompt for us.
    """
    found: dict[str, SystemPrompt] = {}
    left = MAX_PARSED_BYTES
    for file in itertools.islice(files, MAX_FILES):
        try:
            source = read_file(file, MAX_SOURCE_BYTES)
        except OSError:
            continue
        if len(source) > left or not any(name.encode() in source for name in names):
            continue
        left -= len(source)
        for name, text in _assignments(source):
            if name in names and name not in found and is_unicode(text):
                found[name] = SystemPrompt(text=text, source=f"{file}: {name}")
    return found


def _assignments(source: bytes) -> list[tuple[str, str]]:
    """Returns (name, text) of every module-level assignment of a string constant."""
    try:
        with warnings.catch_warnings():
            # Python warns of odd escape sequences and comparisons, which are not ours to fix.
            warnings.simplefilter("ignore")
            body = ast.parse(source.decode("utf-8-sig")).body
        return [pair for node in body for pair in _assigned(node)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # The parser raises the last two for what is nested too deeply.
        return []


def _assigned(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of a statement that assigns a string constant."""
    if isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        targets, value = [node.target], node.value
    else:
        return
    text = _text(value)
    if text is not None:
        yield from ((target.id, text) for target in targets if isinstance(target, ast.Name))


def _text(node: ast.expr) -> str | None:
    """Returns the string that an expression of literals, `+` and `.strip()` spells, or None."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _text(left), _text(right)
            return None if first is None or second is None else first + second
        case ast.Call(func=ast.Attribute(value=value, attr="strip"), args=[], keywords=[]):
            inner = _text(value)
            return None if inner is None else inner.strip()
    return None
