"""Crews without processes: what passes between executor and worker crosses pickled all the same."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sensebatch.config import RunConfig
from sensebatch.contract import Raised, Stop
from sensebatch.executor.crew import execute_crew
from sensebatch.executor.guard import guarded
from sensebatch.executor.host import Outbox, WorkerHost
from sensebatch.executor.messages import Died, News, Order, Said, Unusable
from sensebatch.executor.observer import Summary
from sensebatch.executor.ray_actor import FINAL
from sensebatch.executor.roster import Event, Roster
from sensebatch.jobs import GroupKey, Job, group_key
from sensebatch.store.chains import reading
from sensebatch.store.shards import Shard
from sensebatch.store.store import open_store
from tests.executor.fakes import IDENTITY, FakeEngine, Flag, Recorder, read_input


class _Actor:
    """One life of a worker: a host in this process, and a thread that carries its news."""

    def __init__(
        self, number: int, life: int, engine: FakeEngine, crew: ThreadCrew, groups: list[GroupKey]
    ) -> None:
        self.is_alive = True
        self.engine = engine
        self._number, self._life, self._crew = number, life, crew
        self._outbox = Outbox()
        self.host = WorkerHost(
            engine,
            number=number,
            device="fake device",
            output=crew.config.output,
            outbox=self._outbox,
        )
        self._outbox.put(self.host.ready(groups))
        self._pump = threading.Thread(target=self._carry, daemon=True)
        self._pump.start()

    def _carry(self) -> None:
        while self.is_alive:
            for news in self._outbox.fetch(0.05):
                if self.is_alive:
                    self.say(news)

    def say(self, news: News) -> None:
        self._crew.said(self._number, self._life, news)

    def die(self, reason: str, *, is_of_node: bool = False) -> None:
        self.is_alive = False
        self.say(Died(reason=reason, is_of_node=is_of_node))

    def end(self) -> None:
        self.is_alive = False
        self.host.close()
        self._pump.join()


class ThreadCrew:
    """Hosts fake engines in threads; a life of a worker can be ended as a kill would."""

    def __init__(
        self,
        num_workers: int,
        config: RunConfig,
        jobs: Sequence[Job],
        make_engine: Callable[[int, ThreadCrew], Any] = lambda _n, _c: FakeEngine(a_pass=1),
    ) -> None:
        self.config = config
        self.numbers = range(num_workers)
        self.actors: dict[int, _Actor] = {}
        self.lives: list[int] = []
        """The workers that were started, in order."""
        self.ended: list[_Actor] = []
        self.orders: list[tuple[int, Order]] = []
        self._groups = list(dict.fromkeys(group_key(job) for job in jobs))
        self._make_engine = make_engine
        self.planned: Any = None
        """What the plan says of batches."""
        self.on_said: Callable[[int, News], None] = lambda _number, _news: None

    def open(self, events: SimpleQueue[Event]) -> None:
        self._events = events

    def start(self, worker: int, life: int) -> None:
        self.lives.append(worker)
        engine = guarded(lambda: self._make_engine(worker, self))
        if isinstance(engine, Raised):
            is_final = engine.failure.type in FINAL
            self.said(worker, life, Unusable(failure=engine.failure, is_final=is_final))
            return
        self.actors[worker] = _Actor(worker, life, engine, self, self._groups)

    def said(self, worker: int, life: int, news: News) -> None:
        crossed = pickle.loads(pickle.dumps(news))
        self._events.put(Said(worker=worker, life=life, news=crossed))
        self.on_said(worker, news)

    def tell(self, worker: int, order: Order) -> None:
        self.orders.append((worker, order))
        if self.actors[worker].is_alive:
            self.actors[worker].host.take(pickle.loads(pickle.dumps(order)))

    def kill(self, worker: int, *, is_of_node: bool = False) -> None:
        """Ends a worker's life from any thread, as a signal would."""
        if self.actors[worker].is_alive:
            self.actors[worker].die("killed", is_of_node=is_of_node)

    def end(self, worker: int) -> None:
        if worker in self.actors:
            self.actors[worker].is_alive = False
            self.ended.append(self.actors[worker])

    def close(self) -> None:
        for actor in (*self.ended, *self.actors.values()):
            actor.end()


def run_crew(
    root: Path,
    jobs: Sequence[Job],
    config: RunConfig,
    crew: Any,
    *,
    seen: Recorder | None = None,
    stop: Stop | None = None,
    shard: Shard | None = None,
    **options: Any,
) -> Summary:
    """Opens a run's folder, ingests jobs and has a crew run them."""
    seen, stop = seen or Recorder(), stop or Flag()
    roster = Roster(crew, seen.note, planned=getattr(crew, "planned", None))
    try:
        with open_store(root) as store:
            store.state.ingest(jobs, IDENTITY, root, shard=shard)
            roster.assemble(stop)
            return execute_crew(
                store=store,
                roster=roster,
                config=config,
                read_image=reading(root, read_input),
                observer=seen,
                stop=stop,
                **options,
            )
    finally:
        crew.close()
