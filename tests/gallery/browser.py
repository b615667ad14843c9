"""The browser that tests open galleries in: Chromium of the system, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage, Page

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
"""Path of the browser; None where there is none."""


def chromium_options(path: str | None) -> dict[str, Any]:
    """Returns what `launch` is given."""
    # Shared memory is small in many containers, and Chromium's sandbox does not work for root.
    args = ["--disable-dev-shm-usage"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        args.append("--no-sandbox")
    return {"executable_path": path, "args": args}


class Opened:
    """Opens galleries from disk and notes what goes wrong in them.

    Args:
        context: What the pages share: storage, clipboard, size of the window.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.context = context
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.expects_missing = False
        """Whether files are missing on purpose, which the browser reports."""

    def page(self, gallery: Path, view: str = "") -> Page:
        """Returns a page of a gallery that has read everything.

        Args:
            gallery: Its folder.
            view: The part of the address after `#`.
        """
        page = self.context.new_page()
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        page.on("console", self._note)
        page.goto(f"{(gallery / 'index.html').absolute().as_uri()}#{view}")
        page.wait_for_selector("html[data-complete]", state="attached")
        return page

    def _note(self, message: ConsoleMessage) -> None:
        is_missing = self.expects_missing and "ERR_FILE_NOT_FOUND" in message.text
        if message.type in ("error", "warning") and not is_missing:
            self.problems.append(message.text)


def ids(page: Page) -> list[str]:
    """Returns the ids of the items that the grid shows, in their order."""
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('.tile')]"
        ".sort((a, b) => a.ariaPosInSet - b.ariaPosInSet).map((tile) => tile.dataset.item)"
    )
    return found


def open_item(page: Page, job_id: str) -> None:
    """Opens an item as someone who clicks on it."""
    page.locator(f'.tile[data-item="{job_id}"]').click()
    page.wait_for_selector("dialog.viewer .panel h3")
