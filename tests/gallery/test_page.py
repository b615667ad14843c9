"""The page's own files: no markup from data, no network, nothing that has to be built."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

PAGE = Path(str(resources.files("sensebatch.gallery").joinpath("page")))
START = (PAGE / "index.html").read_text(encoding="utf-8")
SCRIPTS = sorted(PAGE.glob("*.js"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_make_no_markup_or_code_of_text(path: Path) -> None:
    text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|"
        r"createContextualFragment|srcdoc|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\("
    )
    assert re.findall(forbidden, text) == []
    assert '"use strict"' in text


@pytest.mark.parametrize("path", sorted(PAGE.iterdir()), ids=lambda path: path.name)
def test_no_file_names_another_place(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"https?://|@import|\burl\((?!\"sheets/)", text) == []


def test_the_policy_allows_nothing_but_the_gallerys_own_files() -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', START)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert "<script>" not in START
    assert not re.findall(r"\son\w+=|style=", START)


def test_the_page_loads_every_script_once() -> None:
    loaded = re.findall(r'<script defer src="page/([^"]+)"', START)
    assert sorted(loaded) == [path.name for path in SCRIPTS]
