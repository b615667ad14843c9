"""A browser for the tests that look at a gallery as people do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sensebatch.gallery.make import make_gallery
from tests.gallery.browser import CHROMIUM, Opened, chromium_options
from tests.gallery.runs import make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DEMANDED = "SENSEBATCH_BROWSER_TESTS"
"""Set to `demanded`, it makes a failure of what would be skipped: `.ci/run` does."""


def _missing(reason: str) -> None:
    if os.environ.get(DEMANDED) == "demanded":
        pytest.fail(f"{DEMANDED} is set, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The browser; skips where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("the package playwright is not installed (pip install -e .[dev])")
    if CHROMIUM is None:
        _missing("there is no Chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**chromium_options(CHROMIUM))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with jobs of every kind, and its gallery."""
    root = make_run(tmp_path_factory.mktemp("runs") / "night")
    make_gallery([root], root / "gallery")
    return root


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Opened]:
    """Opens galleries, and makes sure at the end that nothing went wrong in them."""
    context = chromium.new_context(
        viewport={"width": 1280, "height": 800},
        permissions=["clipboard-read", "clipboard-write"],
        accept_downloads=True,
    )
    # Only what is broken takes long.
    context.set_default_timeout(60_000)
    opened = Opened(context)
    yield opened
    context.close()
    assert opened.problems == []
    assert [url for url in opened.requests if not url.startswith(("file:", "blob:", "data:"))] == []
