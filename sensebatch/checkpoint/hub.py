"""Checkpoints from the Hub, through huggingface_hub's cache. Knows nothing of their content.

huggingface_hub itself reads HF_HOME, HF_HUB_OFFLINE and the login token.
"""

from __future__ import annotations

import re
from pathlib import Path

from sensebatch.checkpoint.card import CARD
from sensebatch.errors import CheckpointError

FILE_PATTERNS = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.py",
    CARD,
)
"""The files that are downloaded: weights, tokenizer, Python that may hold system prompts, and the
model card, which names the licence."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(model: str) -> bool:
    """Returns whether a name has the form `owner/name`."""
    return _HUB_ID.fullmatch(model) is not None


def download(repo_id: str, revision: str | None = None) -> Path:
    """Returns the folder of a Hub checkpoint in the local cache, downloading what is missing.

    Raises:
        CheckpointError: There is no such checkpoint or revision, it needs a login, or the Hub
            cannot be reached and the cache does not have it.
    """
    # Imported here, because a run from a folder does not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = repo_id if revision is None else f"{repo_id} at {revision}"
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=list(FILE_PATTERNS))
        )
    except GatedRepoError as error:
        raise CheckpointError(f"{at}: the Hub requires a login with access to it") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{at}: no such folder, and no such checkpoint on the Hub") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{at}: no such revision on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{at}: no such folder, not in the Hub cache, and the Hub cannot be reached"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{at}: cannot be fetched from the Hub: {error}") from error
