from __future__ import annotations

from pathlib import Path

import pytest

from sensebatch.checkpoint.card import CARD, model_license
from sensebatch.checkpoint.files import TINY_FOLDER


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: sensenova", "sensenova"),
        ("license: other", "other"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license: mit\r", "mit"),
        ("tags: [x]", None),
        ("license:", None),
        ("- license", None),
        ("license: {", None),
    ],
)
def test_licence_is_what_the_card_names(tmp_path: Path, head: str, found: str | None) -> None:
    (tmp_path / CARD).write_text(f"---\n{head}\n---\n# A model\n", newline="")
    assert model_license(tmp_path) == found


@pytest.mark.parametrize("content", [b"", b"license: mit", b"---\nlicense: mit\n", b"\xff\xfe---"])
def test_card_without_a_head_names_no_licence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CARD).write_bytes(content)
    assert model_license(tmp_path) is None


def test_folder_without_a_card_names_no_licence(tmp_path: Path) -> None:
    assert model_license(tmp_path) is None
    (tmp_path / CARD).mkdir()
    assert model_license(tmp_path) is None


def test_embedded_checkpoint_has_the_licence_of_the_project() -> None:
    assert model_license(TINY_FOLDER) == "apache-2.0"
