"""Measures a page in a real browser: `python -m tests.gallery.measure INDEX.HTML`.

Prints milliseconds: until the first screen of images is drawn, until all prompts can be searched,
and of searching, filtering, sorting and scrolling, each from the input to the finished grid.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.gallery.browser import CHROMIUM, chromium_options

OPENED = """async () => {
  const urls = new Set([...document.querySelectorAll(".tile .thumb")].map(
    (node) => node.style.backgroundImage.slice(5, -2)));
  await Promise.all([...urls].map((url) => {
    const image = new Image(); image.src = url; return image.decode();
  }));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now();
}"""
ACT = """async ([kind, value]) => {
  const began = performance.now();
  if (kind === "search") {
    const field = document.getElementById("search");
    field.value = value;
    field.dispatchEvent(new Event("input"));
    // The page waits for the typing to pause.
    while (SB.lastSearch !== value) await new Promise((done) => setTimeout(done));
  }
  if (kind === "click") document.querySelector(value).click();
  if (kind === "sort") {
    const select = document.getElementById("sort");
    select.value = value;
    select.dispatchEvent(new Event("change"));
  }
  document.body.offsetHeight;
  return [performance.now() - began, SB.lastApplied];
}"""


def measure(page: Page, address: str) -> dict[str, float]:
    """Returns the milliseconds of each thing that is done."""
    page.goto(address, wait_until="commit")
    page.wait_for_selector("html[data-ready]")
    found = {"open, first images decoded": page.evaluate(OPENED)}
    page.wait_for_selector("html[data-complete]", timeout=60_000)
    found["all prompts here"] = page.evaluate("performance.now()")
    acts = {
        "search one word": ("search", "lighthouse"),
        "search three words": ("search", "red fox -snow"),
        "search by a column": ("search", "total_s>50"),
        "clear the search": ("search", ""),
        "filter by status": ("click", '[data-column="status"] input'),
        "filter by a second tag": ("click", '[data-column="tags"] input'),
        "take a filter away": ("click", "#header .chip"),
        "sort by a figure": ("sort", "total_s"),
        "sort by a word": ("sort", "artist"),
        "sort by prompt": ("sort", "prompt"),
    }
    for name, act in acts.items():
        whole, applied = page.evaluate(ACT, list(act))
        found[name] = applied if act[0] == "search" else whole
    return found


def main() -> None:
    """Prints the figures of the page that the command line names."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**chromium_options(CHROMIUM))
        print(browser.version)
        for _ in range(3):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            for name, milliseconds in measure(page, Path(sys.argv[1]).resolve().as_uri()).items():
                print(f"{milliseconds:8.0f} ms  {name}")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
