"""Keeps finished images while the next ones are computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from sensebatch.contract import Channel, Drawn
from sensebatch.errors import BatchStoppedError


class Keeper:
    """Has images kept by a thread of its own, one call at a time.

    A context, whose end waits for the last call. Nothing else may be kept inside it.

    Args:
        channel: What keeps them.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="keeper")
        self._keeping: Future[None] | None = None

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
            Exception: What the last call raised, unless the block failed. Being stopped is not a
                failure, and must not hide that something could not be kept.
        """
        self._threads.shutdown(wait=True)
        if error is None or isinstance(error, BatchStoppedError):
            self._wait()

    def keep(self, drawn: Drawn) -> None:
        """Begins to keep images once those before are kept.

        Args:
            drawn: They must no longer change.

        Raises:
            Exception: What the call before raised.
        """
        self._wait()
        self._keeping = self._threads.submit(self._channel.keep, drawn)

    def _wait(self) -> None:
        keeping, self._keeping = self._keeping, None
        if keeping is not None:
            keeping.result()
