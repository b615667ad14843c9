"""The files of a gallery: the page, and its data as scripts, because a page that was opened from
disk may load scripts and images but not read files.

A gallery that is made again gets its data in a folder of another name, and `index.js` is replaced
last, so that a page never mixes two of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from sensebatch.errors import RunFolderError
from sensebatch.store.files import write_atomic

PAGE, DATA, SHEETS, FILES = "page", "data", "sheets", "files"
"""The parts of a gallery's folder; `files` holds images that were copied."""
START = "index.html"
INDEX = "index.js"
_UNFINISHED = "unfinished"
_MARK = ".sensebatch-gallery"
"""The file by which a folder is known as a gallery, whose files may be replaced and removed."""


def require_own(out: Path) -> None:
    """Makes sure that a folder is a gallery, or can become one.

    Raises:
        RunFolderError: Something else is there.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise RunFolderError(f"{out}: expected a folder for the gallery, found a file")
    if any(out.iterdir()) and not (out / _MARK).is_file():
        raise RunFolderError(
            f"{out}: expected a gallery, an empty folder or none, found a folder of other files; "
            "choose another one with --output"
        )


def make_own(out: Path) -> None:
    """Makes the folder of a gallery.

    Raises:
        OSError: It cannot be made.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
    (out / SHEETS).mkdir(exist_ok=True)


def write_page(out: Path) -> None:
    """Writes the parts of the page that are the same in every gallery."""
    source = resources.files("sensebatch.gallery").joinpath("page")
    (out / PAGE).mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        name = START if file.name == START else f"{PAGE}/{file.name}"
        write_atomic(out / name, file.read_bytes())


class DataFiles:
    """Writes the data of a gallery beside that of the gallery before it.

    Args:
        out: The gallery's folder.
    """

    def __init__(self, out: Path) -> None:
        self._data = out / DATA
        self._folder = self._data / _UNFINISHED
        self._hash = hashlib.sha256()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)

    def write(self, name: str, value: Any) -> None:
        """Writes a file that the page reads when it needs it."""
        content = _script(name, value)
        self._hash.update(content)
        (self._folder / f"{name}.js").write_bytes(content)

    def finish(self, index: dict[str, Any]) -> None:
        """Puts the files in place, then the index that names them; removes those before."""
        name = self._hash.hexdigest()[:16]
        folder = self._data / name
        shutil.rmtree(folder, ignore_errors=True)
        self._folder.rename(folder)
        write_atomic(self._data / INDEX, _script("index", {**index, "data": name}))
        for other in self._data.iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other, ignore_errors=True)


def _script(name: str, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # As a text in a script: browsers read that sooner than the same values as a program.
    return f"SB.give({json.dumps(name)},{json.dumps(text, ensure_ascii=False)})\n".encode()


def copy_images(root: Path, folder: Path, paths: Iterable[str]) -> None:
    """Makes a folder have images of a run: copies those that are not there as they are now.

    Those that are missing are left out, and others that the folder has are removed.

    Raises:
        OSError: An image cannot be copied.
    """
    wanted = set()
    for path in paths:
        source, copy = root / path, folder / path
        wanted.add(copy)
        try:
            status = source.stat()
        except OSError:
            continue
        if copy.is_file():
            there = copy.stat()
            if (there.st_size, there.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
                continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)
    for copy in folder.rglob("*"):
        if copy.is_file() and copy not in wanted:
            copy.unlink()
