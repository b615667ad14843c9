"""Reads a few rows ahead of the one whose turn it is, so that what they name can be begun.

Everything else happens in the order of the rows, as without it: what is reported while a row is
read, and the error that ends the reading.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NoReturn

from sensebatch.manifest.problems import Location
from sensebatch.manifest.rows import RawRow, Report

ROWS_AHEAD = 8


class RowsAhead:
    """Rows in turn, each of which was shown before its turn.

    Args:
        report: Receives what `report` of this object receives, in the order of the rows.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._queue: deque[RawRow | Callable[[], object]] = deque()
        self._reads = False

    def report(self, number: int, location: Location, message: str) -> None:
        """Hands an error in a file on, once it is the turn of the rows around it."""
        if self._reads:
            self._queue.append(partial(self._report, number, location, message))
        else:
            self._report(number, location, message)

    def rows(self, rows: Iterable[RawRow], show: Callable[[RawRow], None]) -> Iterator[RawRow]:
        """Yields rows.

        Args:
            rows: Are read as they are needed, `ROWS_AHEAD` ahead.
            show: Is called with each as soon as it is read.
        """
        iterator, self._reads = iter(rows), True
        num_ahead, ended = 0, False
        while True:
            while not ended and num_ahead < ROWS_AHEAD:
                try:
                    row = next(iterator)
                except StopIteration:
                    ended = True
                except Exception as error:
                    self._queue.append(partial(_raise, error))
                    ended = True
                else:
                    show(row)
                    self._queue.append(row)
                    num_ahead += 1
            if not self._queue:
                return
            item = self._queue.popleft()
            if isinstance(item, RawRow):
                num_ahead -= 1
                yield item
            else:
                item()


def _raise(error: Exception) -> NoReturn:
    raise error
