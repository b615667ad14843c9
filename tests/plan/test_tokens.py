from __future__ import annotations

import pytest

from sensebatch.plan.tokens import text_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("a red house", 4),
        ("2026-11-23", 8 + 1),
        ("\N{LEFT DOUBLE QUOTATION MARK}ah\N{RIGHT DOUBLE QUOTATION MARK}", 2 + 1),
        ("красный дом", 10 + 1),
        ("一座红房子", 5),
        ("\N{HOUSE BUILDING}\N{HOUSE BUILDING}", 8),
        ("บ้าน", 4 * 3),
    ],
)
def test_tokens_of_a_text_are_estimated_from_above(text: str, tokens: int) -> None:
    """Of digits and of scripts that most tokenizers split finely too."""
    assert text_tokens(text) == tokens
