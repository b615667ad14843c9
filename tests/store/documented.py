"""The table of docs/log.md, from the text under the fields of `Attempt`.

`python -m tests.store.documented` writes it.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pyarrow as pa

from sensebatch.store.attempts import Attempt, Marks
from sensebatch.store.columns import arrow_schema

DOCS = Path(__file__).parents[2] / "docs" / "log.md"
START = "| Column | Type | Meaning |\n| --- | --- | --- |\n"


def table(*rows: type) -> str:
    """Returns the columns that dataclasses declare as a Markdown table."""
    lines = [
        f"| `{field.name}` | {_word(field.type)} | {_linked(field_texts(row)[field.name])} |\n"
        for row in rows
        for field in arrow_schema(row)
    ]
    return START + "".join(lines)


def field_texts(row: type) -> dict[str, str]:
    """Returns the text under each field of a class that has one, on one line."""
    declared = ast.parse(inspect.getsource(row)).body[0]
    assert isinstance(declared, ast.ClassDef)
    texts = {}
    for field, text in zip(declared.body, declared.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(said))
            ):
                texts[name] = " ".join(said.split())
    return texts


def written(document: str) -> str:
    """Returns the document with its table as the columns are declared."""
    start = document.index("| Column |")
    end = document.index("|\n\n", start) + 2 if "|\n\n" in document[start:] else len(document)
    return document[:start] + table(Attempt, Marks) + document[end:]


def _linked(text: str) -> str:
    """Returns a text with links to the pages of docs/ that it names."""
    return re.sub(r"\b(\w+\.md)(#[\w-]+)?", r"[\1](\1\2)", text)


def _word(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_word(kind.value_type)}"
    return "timestamp, µs" if pa.types.is_timestamp(kind) else str(kind)


if __name__ == "__main__":
    DOCS.write_text(written(DOCS.read_text()))
