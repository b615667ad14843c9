"""A card that a person changed: the `configs` of its header follow the set, the rest stays theirs.

`load_dataset` and the Hub find subsets and splits there alone. A `data_files` entry belongs to the
export if its path is one that the export writes; all others belong to the person. huggingface_hub
would write the whole header anew, without the comments in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import yaml

from sensebatch.tasks import Task
from sensebatch.yaml_values import YamlTextError, YamlValue, dump_yaml, load_yaml

_FENCE = "---"
_KEY = "configs"
_SPLIT = "\0"

Config = Mapping[str, Any]
"""A subset: `config_name`, `data_files`, and maybe `default`."""


def with_configs(
    text: str, wanted: Sequence[Config], pattern: Callable[[str, str], str]
) -> str | None:
    """Returns a card whose header names the subsets and splits of a set.

    Args:
        text: The card as it is.
        wanted: The subsets of the set, as a card of the export has them.
        pattern: Returns which files are those of a task and split.

    Returns:
        The same text where all is named already; None where there is no header, or none that can
        be changed without changing more than `configs`.
    """
    lines = text.split("\n")
    fences = [number for number, line in enumerate(lines) if line.rstrip() == _FENCE]
    if len(fences) < 2 or fences[0] != 0:
        return None
    header = _loaded(lines[1 : fences[1]])
    if header is None:
        return None
    there = header.value.get(_KEY)
    known = [] if there is None else there
    if not _is_list_of_mappings(known):
        return None
    configs = _merged(known, wanted, pattern)
    if configs == there:
        return text
    start, end = _lines_of(header.node, fences[1] - 1)
    ending = "\r" if lines[0].endswith("\r") else ""
    written = [f"{line}{ending}" for line in dump_yaml({_KEY: configs}).splitlines()]
    head = [*lines[1 : start + 1], *written, *lines[end + 1 : fences[1]]]
    changed = _loaded(head)
    if changed is None or changed.value != {**header.value, _KEY: configs}:
        return None
    return "\n".join([lines[0], *head, *lines[fences[1] :]])


def _loaded(lines: Sequence[str]) -> YamlValue | None:
    """Returns a header; None if it is no mapping."""
    try:
        found = load_yaml("\n".join(lines))
    except YamlTextError:
        return None
    return found if isinstance(found.value, dict) else None


def _lines_of(header: yaml.Node, num_lines: int) -> tuple[int, int]:
    """Returns the first line of `configs` and the one after its last; those at the end if none."""
    for key, value in header.value:
        if key.value == _KEY:
            return key.start_mark.line, _end(value)
    return num_lines, num_lines


def _end(node: yaml.Node) -> int:
    """Returns the line after a node, without the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    # A block of text ends where the next line begins.
    return node.end_mark.line + (node.end_mark.column > 0)


def _merged(
    there: Sequence[Config], wanted: Sequence[Config], pattern: Callable[[str, str], str]
) -> list[dict[str, Any]]:
    """Returns the subsets of a header with those entries of the export that the set has now."""
    paths = {file["path"] for config in wanted for file in config["data_files"]}
    merged: list[dict[str, Any]] = []
    for config in there:
        files = config.get("data_files")
        if not _is_list_of_mappings(files):
            merged.append(dict(config))
            continue
        kept = [file for file in files if not _is_outdated(file.get("path"), paths, pattern)]
        if kept:
            merged.append({**config, "data_files": kept})
    named = {path for config in merged for path in _paths(config.get("data_files"))}
    by_name = {str(config.get("config_name")): config for config in merged}
    for config in wanted:
        name = config["config_name"]
        missing = [file for file in config["data_files"] if file["path"] not in named]
        if missing and name not in by_name:
            merged.append({"config_name": name, "data_files": missing})
        # Files that are named in another way, such as by one pattern, are the person's choice.
        elif missing and _is_list_of_mappings(by_name[name].get("data_files")):
            by_name[name]["data_files"] += missing
    had_default = not there or any(config.get("default") for config in there)
    if had_default and not any(config.get("default") for config in merged):
        merged[0]["default"] = True
    return merged


def _is_outdated(path: Any, paths: set[str], pattern: Callable[[str, str], str]) -> bool:
    """Returns whether a path is of the export and of a split that the set has no more."""
    if not isinstance(path, str) or path in paths:
        return False
    for task in Task:
        start, _, end = (re.escape(part) for part in pattern(task, _SPLIT).partition(_SPLIT))
        if re.fullmatch(rf"{start}[A-Za-z0-9_]+{end}", path):
            return True
    return False


def _paths(files: Any) -> Iterator[str]:
    """Yields the paths in `data_files`, in whichever of its forms."""
    if isinstance(files, str):
        yield files
    elif isinstance(files, list):
        for file in files:
            yield from _paths(file)
    elif isinstance(files, dict):
        yield from _paths(files.get("path"))


def _is_list_of_mappings(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
