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
def test_text_tokens_are_never_underestimated(text: str, tokens: int) -> None:
    """Including digits, and scripts that most tokenizers split finely."""
    assert text_tokens(text) == tokens
