"""Keeps finished pictures as checkpoints while the next ones are computed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from sensebatch.contract import Checkpoints, KeptImage
from sensebatch.errors import BatchStoppedError


class Keeper:
    """Saves checkpoints in a thread of its own, one at a time.

    A context, whose end waits for the last save. Nobody else may use the checkpoints inside it.

    Args:
        checkpoints: Where pictures are kept; already loaded.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="keeper")
        self._saving: Future[None] | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the thread.

        Raises:
            Exception: What the last save raised, unless the block failed. To be stopped is no
                failure, and must not hide that something could not be kept.
        """
        self._threads.shutdown(wait=True)
        if error is None or isinstance(error, BatchStoppedError):
            self._wait()

    def keep(self, drawn: Sequence[tuple[int, KeptImage]]) -> None:
        """Starts to save pictures once those before are saved.

        Args:
            drawn: Of `Checkpoints.save`; must not change any more.

        Raises:
            Exception: What the save before raised.
        """
        self._wait()
        self._saving = self._threads.submit(self._checkpoints.save, drawn)

    def _wait(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()
