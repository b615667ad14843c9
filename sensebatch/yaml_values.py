"""YAML values and the lines they are on, with the plain words of YAML 1.2.

By the older rules, which PyYAML follows, `16:9` would be a number of seconds, `no` would be false
and `1e6` a text. Manifests and configuration files are read by the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from sensebatch.bounded import MAX_DEPTH, MAX_DIGITS, is_unicode, read_file, shown

try:
    from yaml import CSafeLoader as _Loader
except ImportError:
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]

MAX_VALUES = 20_000_000
"""The most values of a document, aliases counted in full; more jobs need another format."""
MAX_BYTES = 2**30
"""The largest file."""

_OPENINGS = re.compile(r"^[ ?:-]*", re.MULTILINE)
"""What nests a line in the blocks around it: at least one character for each level."""
_STRING = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
_NULL = "tag:yaml.org,2002:null"
_INTEGER = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_PLAIN_WORDS = (
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INTEGER, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    (_MERGE, r"<<", ["<"]),
)


_MAX_SHOWN = 40
"""The most characters of a line that a message repeats."""
_MISTAKES = (
    ("cannot start any token", "expected quotes around text that begins so, found {found}"),
    ("undefined alias", "expected quotes around text that begins so, found {found}"),
    (
        "mapping values are not allowed",
        "expected one 'name: value' on a line, or quotes around text with ': ', found {found}",
    ),
    ("escape", "expected two backslashes for one in double quotes, found {found}"),
    ("quoted scalar", "expected a closing quote, found none"),
    ("flow node", "expected a value or a closing bracket, found {found}"),
    ("flow sequence", "expected ',' or ']' for the '[' on line {opened}, found {found}"),
    ("flow mapping", "expected ',' or '}}' for the '{{' on line {opened}, found {found}"),
    (
        "a block ",
        "expected 'name: value' or '- item', as far in as on line {opened}, found {found}",
    ),
    ("could not find expected ':'", "expected 'name: value', found {found}"),
    ("another document", "expected one document, found '---' and another one"),
)
"""What the library says of a mistake, and what the message says instead."""

_WORDS = {tag: re.compile(pattern) for tag, pattern, _ in _PLAIN_WORDS}
_COLLECTIONS = frozenset(["tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"])


class YamlTextError(Exception):
    """Text that is not YAML, or a value that none of our files can hold.

    Args:
        message: What is wrong.
        line: The line, counted from 1.
    """

    def __init__(self, message: str, line: int) -> None:
        self.line = line
        super().__init__(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlValue:
    """A value and the node that it comes from."""

    value: Any
    node: yaml.Node

    def line_of(self, location: Sequence[str | int]) -> int:
        """Returns the line of a field inside the value, or of the last part that exists."""
        node, line = self.node, self.node.start_mark.line
        for part in location:
            step = _step(node, part)
            if step is None:
                break
            line, node = step
        return line + 1

    def child(self, key: str) -> YamlValue:
        """Returns the value of a key that the mapping has."""
        step = _step(self.node, key)
        # A merged key is in another node; its lines are not reported.
        return YamlValue(value=self.value[key], node=self.node if step is None else step[1])

    def children(self, *location: str) -> Iterator[YamlValue]:
        """Yields the items of the list at a location inside the value."""
        node, value = self.node, self.value
        for part in location:
            step = _step(node, part)
            if step is None:
                return
            node, value = step[1], value[part]
        for child, item in zip(node.value, value, strict=True):
            yield YamlValue(value=item, node=child)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, starts in _PLAIN_WORDS:
        for start in starts:
            table.setdefault(start, []).append((tag, re.compile(rf"(?:{pattern})$")))
    return table


def _resolvers_of_both() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Returns the plain words of YAML 1.2, then those of the older rules."""
    ours = _resolvers()
    older = yaml.SafeDumper.yaml_implicit_resolvers
    return {start: ours.get(start, []) + words for start, words in older.items()}


class _ValueLoader(_Loader):
    yaml_implicit_resolvers = _resolvers()

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        for prefix, base in (("0o", 8), ("0x", 16)):
            if text.startswith(prefix):
                return int(text, base)
        return int(text)

    def construct_real(self, node: yaml.ScalarNode) -> float:
        return float(
            self.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan")
        )


_ValueLoader.add_constructor(_INTEGER, _ValueLoader.construct_integer)
_ValueLoader.add_constructor(_FLOAT, _ValueLoader.construct_real)


class _ValueDumper(yaml.SafeDumper):
    """Quotes every word that is not text to the loader, or by the older rules."""

    yaml_implicit_resolvers = _resolvers_of_both()

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Returns true: every value is written out, however often it occurs."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Returns a text as YAML, escaped if some of its characters are not printable.

        Unescaped, the rarer line breaks (U+0085, U+2028) would be folded away.
        """
        return self.represent_scalar(_STRING, text, style=None if text.isprintable() else '"')


_ValueDumper.add_representer(str, _ValueDumper.represent_text)


def dump_yaml(value: Any) -> str:
    """Returns text that `load_yaml` reads as the same value; keys keep their order."""
    text: str = yaml.dump(value, Dumper=_ValueDumper, sort_keys=False, allow_unicode=True)
    return text


def read_yaml(path: Path) -> YamlValue:
    """Returns the only document of a UTF-8 file; see `load_yaml`.

    Raises:
        OSError: The file cannot be read.
        YamlTextError: As in `load_yaml`, or because the bytes are not UTF-8.
    """
    content = read_file(path, MAX_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"expected UTF-8 text, found byte 0x{content[error.start]:02x}"
        raise YamlTextError(message, _line_at(content, error.start)) from error
    return load_yaml(text)


def load_yaml(text: str) -> YamlValue:
    """Returns the only document of a text; the value of an empty document is None.

    Raises:
        YamlTextError: The text is not YAML, repeats a key, has a key that is not text, contains
            itself, is nested too deeply, or expands to more than `MAX_VALUES`.
    """
    try:
        _check_depth(text)
        loader = _ValueLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                start = yaml.Mark("", 0, 0, 0, "", 0)
                return YamlValue(value=None, node=yaml.ScalarNode(_NULL, "", start, start))
            _check_node(node, set(), {})
            return YamlValue(value=loader.construct_document(node), node=node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text.splitlines()) from error
    except ReaderError as error:
        line = _line_at(text.encode(errors="surrogatepass"), error.position)
        message = f"expected YAML, found character #x{error.character:04x}: {error.reason}"
        raise YamlTextError(message, line) from error
    except (yaml.YAMLError, ValueError) as error:
        raise YamlTextError(f"expected YAML, found an error: {error}", 1) from error


def _syntax_error(error: yaml.MarkedYAMLError, lines: Sequence[str]) -> YamlTextError:
    """Returns what is wrong with a text, in words for the mistakes that people make."""
    said = ", ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return YamlTextError(f"expected YAML, found an error: {said}", 1)
    if "could not find expected ':'" in said and error.context_mark is not None:
        # The library looks on for the colon, up to the end.
        mark = error.context_mark
    line = mark.line
    rest = lines[line][mark.column :] if line < len(lines) else ""
    opened = line if error.context_mark is None else error.context_mark.line
    words = {"found": shown(rest[:_MAX_SHOWN]) if rest else "the end", "opened": opened + 1}
    if rest.startswith("\t"):
        return YamlTextError("expected spaces, which indent YAML, found a tab", line + 1)
    for phrase, message in _MISTAKES:
        if phrase in said:
            # What is never closed is best looked for where it begins.
            at = opened if "closing" in message else line
            return YamlTextError(message.format(**words), at + 1)
    return YamlTextError(f"expected YAML, found an error: {said}", line + 1)


def _check_depth(text: str) -> None:
    """Checks that a document is not nested so deeply that the library would crash.

    Raises:
        YamlTextError: It is.
    """
    brackets = text.count("[") + text.count("{")
    if brackets + max(map(len, _OPENINGS.findall(text)), default=0) <= MAX_DEPTH:
        return
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            line = 1 if event.start_mark is None else event.start_mark.line + 1
            message = f"expected values nested at most {MAX_DEPTH} deep, found more"
            raise YamlTextError(message, line)


def _line_at(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def _step(node: yaml.Node, part: str | int) -> tuple[int, yaml.Node] | None:
    """Returns the line and the node of a mapping's value or a list's item."""
    if isinstance(node, yaml.MappingNode):
        # Merged keys come first in the node, so the last one is the mapping's own.
        for key, value in reversed(node.value):
            if key.value == part:
                return key.start_mark.line, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        item = node.value[part]
        return item.start_mark.line, item
    return None


def _check_node(node: yaml.Node, above: set[int], checked: dict[int, int]) -> int:
    """Checks keys and texts of a node and everything below it, each node once.

    Returns:
        How many values it expands to; an alias counts as much as what it names.
    """
    line = node.start_mark.line + 1
    if id(node) in above:
        raise YamlTextError("expected a finite value, found one that contains itself", line)
    if id(node) in checked:
        return checked[id(node)]
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, line)
        checked[id(node)] = 1
        return 1
    if node.tag not in _COLLECTIONS:
        raise YamlTextError(f"expected a plain value, found the tag {_tag(node)!r}", line)
    above.add(id(node))
    children = node.value
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [value for _, value in node.value]
    count = 1 + sum(_check_node(child, above, checked) for child in children)
    if count > MAX_VALUES:
        message = f"expected at most {MAX_VALUES:,} values, found {count:,} with aliases"
        raise YamlTextError(message, line)
    above.remove(id(node))
    checked[id(node)] = count
    return count


def _tag(node: yaml.Node) -> str:
    """Returns a node's tag as people write it."""
    return str(node.tag).replace("tag:yaml.org,2002:", "!!")


def _check_scalar(node: yaml.ScalarNode, line: int) -> None:
    if not is_unicode(node.value):
        raise YamlTextError("expected Unicode text, found half of a surrogate pair", line)
    if node.tag == _STRING:
        return
    words = _WORDS.get(node.tag)
    if words is None:
        raise YamlTextError(f"expected a plain value, found the tag {_tag(node)!r}", line)
    # An explicit tag may stand before any word.
    if not words.fullmatch(node.value):
        kind = _tag(node).removeprefix("!!")
        raise YamlTextError(f"expected a value of type {kind}, found {node.value[:60]!r}", line)
    if len(node.value) > MAX_DIGITS and node.tag in (_INTEGER, _FLOAT):
        found = f"a number of {len(node.value):,} characters"
        raise YamlTextError(f"expected at most {MAX_DIGITS} digits, found {found}", line)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag not in (_STRING, _MERGE):
            found = repr(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            raise YamlTextError(f"expected text as a key, found {found}", line)
        if key.value in seen:
            raise YamlTextError(f"expected every key once, found {key.value!r} again", line)
        seen.add(key.value)
