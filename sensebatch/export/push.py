"""Uploads an export to a repository of the Hub, by huggingface_hub's upload of large folders.

huggingface_hub itself finds the login token and the endpoint; neither is read or printed here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sensebatch.errors import ConfigError, StorageError
from sensebatch.export.ledger import FOLDER

MAX_FILES = 100_000
"""The most files of a repository of the Hub."""
_TYPE = "dataset"
_AGAIN = "run the same command again to continue"


class Hub:
    """A dataset's repository on the Hub.

    Args:
        repo: `owner/name`, or `name` of the user who is logged in.
        shows_progress: Whether huggingface_hub draws its bars on standard error.

    Raises:
        ConfigError: The name is not one of a repository, or nobody is logged in.
        StorageError: The Hub cannot be reached.
    """

    def __init__(self, repo: str, *, shows_progress: bool) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id
        from huggingface_hub.utils.tqdm import disable_progress_bars

        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise ConfigError(f"--push: expected owner/name, found {repo!r}: {error}") from None
        if not shows_progress:
            disable_progress_bars()
        self._repo = repo
        self._api = HfApi(library_name="sensebatch")
        user = self._asked(self._api.whoami)
        self._repo = repo if "/" in repo else f"{user['name']}/{repo}"

    def push(self, folder: Path, is_own: Callable[[str], bool], *, private: bool) -> str:
        """Uploads a folder, removes shards that it no longer has, and returns the address.

        Args:
            folder: The export.
            is_own: Whether an export may have made a file of this name.
            private: Whether a new repository is private; one that is there stays as it is.

        Raises:
            ConfigError: The user may not write to the repository, or it cannot take the files.
            StorageError: The Hub cannot be reached; the same upload continues.
        """
        files = {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and FOLDER not in path.parts
        }
        if len(files) >= MAX_FILES:
            raise ConfigError(
                f"--push: expected fewer than {MAX_FILES:,} files, which a repository takes, found "
                f"{len(files):,}; export as hf or webdataset"
            )
        where: dict[str, Any] = {"repo_id": self._repo, "repo_type": _TYPE}
        url = self._asked(self._api.create_repo, **where, private=private, exist_ok=True)
        # In several commits, and resumable; `upload_large_folder` of earlier releases is no more.
        left_out = [f"{FOLDER}/*", "*.tmp"]
        self._asked(self._api.upload_folder, **where, folder_path=folder, ignore_patterns=left_out)
        there = self._asked(self._api.list_repo_files, **where)
        outdated = [name for name in there if is_own(name) and name not in files]
        if outdated:
            self._asked(self._api.delete_files, **where, delete_patterns=outdated)
        return str(url)

    def _asked(self, ask: Callable[..., Any], **arguments: Any) -> Any:
        """Returns what the Hub answers."""
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

        try:
            return ask(**arguments)
        except LocalTokenNotFoundError:
            raise ConfigError(
                "--push: expected a login to the Hub, found none; log in with: hf auth login"
            ) from None
        except HfHubHTTPError as error:
            code = None if error.response is None else error.response.status_code
            message = f"--push {self._repo}: {error.server_message or f'the Hub answered {code}'}"
            if code is not None and 400 <= code < 500 and code not in (408, 429):
                hint = "; log in with: hf auth login" if code in (401, 403) else ""
                raise ConfigError(f"{message}{hint}") from None
            raise StorageError(f"{message}; {_AGAIN}") from None
        # Errors of the HTTP library, of which huggingface_hub has had several.
        except Exception as error:
            raise StorageError(f"--push {self._repo}: {error}; {_AGAIN}") from error
