"""What the backend makes of what Ray says; a stub stands for Ray."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from sensebatch.config import OutputConfig, WorkersConfig
from sensebatch.contract import KeptImage
from sensebatch.errors import ConfigError, WorkersLostError
from sensebatch.executor import ray_workers
from sensebatch.executor.messages import Began, Died, Drew, Joined, News, Said, StopWork
from sensebatch.executor.ray_actor import Recipe
from sensebatch.executor.ray_watch import ClusterWatch
from sensebatch.executor.ray_workers import RayCrew

exceptions = pytest.importorskip("ray.exceptions")

UNAVAILABLE = exceptions.ActorUnavailableError("socket closed", None)
RECIPE = Recipe(
    open_engine=lambda _gpu, _share: None,
    output=OutputConfig(),
    groups=(),
    environment={},
    version="0",
    share="run",
)


class Ray:
    """Answers as it is told."""

    exceptions = exceptions
    watches: ClassVar[list[ClusterWatch]] = []

    def __init__(self) -> None:
        self.answer: Any = None
        self.alive, self.num_gpus = True, 0
        self.is_here = True
        self.asked = 0

    def get(self, _: object) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def nodes(self) -> list[dict[str, Any]]:
        resources = {"GPU": float(self.num_gpus)}
        return [
            {"NodeID": "driver", "Alive": self.is_here, "Resources": resources},
            {"NodeID": "here", "Alive": self.alive, "Resources": {"CPU": 2.0}},
        ]

    def remote(self) -> object:
        """Is asked for news."""
        self.asked += 1
        return object()


def new_crew(ray: Ray, monkeypatch: pytest.MonkeyPatch, **workers: Any) -> RayCrew:
    monkeypatch.setattr(ray_workers, "import_ray", lambda: ray)
    crew = RayCrew(WorkersConfig(**workers), RECIPE, uses_gpu=True)
    crew._events = SimpleQueue()
    crew._actors[0], crew._lives[0] = SimpleNamespace(listen=ray), 1
    crew._watch = ClusterWatch(ray, "driver")
    ray.watches.append(crew._watch)
    return crew


@pytest.fixture(autouse=True)
def _no_watch_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    watches: list[ClusterWatch] = []
    monkeypatch.setattr(Ray, "watches", watches)
    yield
    for watch in watches:
        watch.close()


def heard(crew: RayCrew, answer: Any) -> list[News]:
    """Returns what a worker's answer comes to."""
    crew._ray.answer = answer
    crew._questions["question"] = (0, 1)
    crew._take_answer("question")
    found: list[News] = []
    while not crew._events.empty():
        said = crew._events.get()
        assert isinstance(said, Said)
        found.append(said.news)
    return found


def death(error: str) -> Exception:
    died: Exception = exceptions.ActorDiedError()
    died.error_msg = error  # type: ignore[attr-defined]
    return died


def test_news_are_passed_on_and_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray()
    crew = new_crew(ray, monkeypatch)
    assert heard(crew, ("here", [Began(number=1)])) == [Began(number=1)]
    assert ray.asked == 1


def test_a_process_that_was_killed_is_told_from_a_machine_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = Ray()
    crew = new_crew(ray, monkeypatch)
    (killed,) = heard(crew, death("The actor is dead because its worker process has died."))
    assert isinstance(killed, Died)
    assert "its process was killed" in killed.reason
    assert not killed.is_of_node
    gone = heard(crew, death("The actor died because its node has died. Node Id: 7"))
    assert gone == [Died(reason="its machine left the cluster", is_of_node=True)]


def test_a_node_that_is_no_longer_alive_took_its_workers_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = Ray()
    crew = new_crew(ray, monkeypatch)
    heard(crew, ("here", []))
    ray.alive = False
    assert heard(crew, death("nothing is known")) == [
        Died(reason="its machine left the cluster", is_of_node=True)
    ]


def test_a_worker_that_cannot_be_reached_is_asked_until_ray_knows_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crew = new_crew(Ray(), monkeypatch)
    assert heard(crew, UNAVAILABLE) == []
    assert [(worker, life) for _, worker, life in crew._again] == [(0, 1)]
    (gone,) = heard(crew, death("The actor died because its node has died. Node Id: 7"))
    assert isinstance(gone, Died)
    assert gone.is_of_node


def test_a_worker_that_is_reached_again_may_have_said_what_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crew = new_crew(Ray(), monkeypatch)
    heard(crew, UNAVAILABLE)
    (died,) = heard(crew, ("here", [Began(number=1)]))
    assert died == Died(reason="its messages were lost while it could not be reached")


def test_no_worker_is_started_again_once_ray_has_ended_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = Ray()
    crew = new_crew(ray, monkeypatch)
    ray.is_here = False
    with pytest.raises(WorkersLostError, match="Ray has ended on the machine of the run"):
        heard(crew, exceptions.ActorDiedError())
    assert crew._events.empty()


def test_nothing_large_is_moved_once_ray_has_ended_here(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray()
    crew = new_crew(ray, monkeypatch)
    monkeypatch.setattr(ClusterWatch, "has_ended_here", True)
    for name in ("get", "kill", "remote"):
        monkeypatch.setattr(ray, name, ended_process, raising=False)
    crew._actors[0].tell = SimpleNamespace(remote=ended_process)
    crew.tell(0, StopWork())
    crew.start(0, 2)
    crew._questions["question"] = (0, 1)
    with pytest.raises(WorkersLostError, match="Ray has ended on the machine of the run"):
        crew._take_answer("question")
    crew.end(0)


def ended_process(*_: object, **__: object) -> None:
    raise AssertionError("Ray would have ended the process")


def test_a_worker_that_ray_does_not_take_an_order_for_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise exceptions.ObjectStoreFullError("no room for the order")

    def disconnected(*_: object) -> None:
        raise ConnectionError("the client is disconnected")

    crew = new_crew(Ray(), monkeypatch)
    crew._actors[0].tell = SimpleNamespace(remote=disconnected)
    crew.tell(0, StopWork())
    assert crew._events.empty()
    crew._actors[0].tell = SimpleNamespace(remote=refuse)
    crew.tell(0, StopWork())
    said = crew._events.get_nowait()
    assert isinstance(said, Said)
    assert isinstance(said.news, Died)
    assert (said.worker, said.life) == (0, 1)
    assert said.news.reason.startswith("an order could not be sent to it: ")


def test_a_broken_line_to_ray_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray()
    crew = new_crew(ray, monkeypatch)

    def wait(*_: object, **__: object) -> None:
        monkeypatch.setattr(ClusterWatch, "has_ended_here", True)
        raise OSError("Broken pipe")

    monkeypatch.setattr(ray, "wait", wait, raising=False)
    crew._questions["question"] = (0, 1)
    crew._listen()
    said = crew._events.get()
    assert not isinstance(said, Said)
    with pytest.raises(WorkersLostError, match="Ray has ended on the machine of the run; the same"):
        said()


def test_images_that_are_passed_on_are_no_longer_in_the_memory_of_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_ray = np.ones((3, 2, 2), np.float32)
    drew = Drew(number=1, drawn=((0, KeptImage(image=of_ray, tokens=(1,))),))
    (found,) = heard(new_crew(Ray(), monkeypatch), ("here", [drew]))
    assert isinstance(found, Drew)
    ((index, kept),) = found.drawn
    assert (index, kept.tokens) == (0, (1,))
    assert np.array_equal(kept.image, of_ray)
    assert not np.shares_memory(kept.image, of_ray)


def test_a_worker_that_stays_out_of_reach_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "_DOUBT_S", 0.0)
    (died,) = heard(new_crew(Ray(), monkeypatch), UNAVAILABLE)
    assert died == Died(reason="its process or its machine can no longer be reached")


def test_gpus_that_are_added_to_a_cluster_are_said_unless_workers_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for count, expected in ((None, [2]), (2, [])):
        ray = Ray()
        ray.num_gpus = 2
        crew = new_crew(ray, monkeypatch, cluster="auto", count=count)
        crew._numbers = range(crew._num_workers())
        ray.num_gpus = 3
        crew._watch.alive()  # Asks again.
        crew._look()
        found = []
        while not crew._events.empty():
            said = crew._events.get()
            assert isinstance(said, Said)
            assert said.news == Joined()
            found.append(said.worker)
        assert found == expected


@pytest.mark.parametrize(
    ("workers", "num_gpus", "message"),
    [
        ({}, 0, "--gpus: expected GPUs on this machine, found none"),
        ({"cluster": "auto"}, 0, "--gpus: expected GPUs on the cluster, found none"),
        ({"count": 3}, 2, "--workers: expected at most 2, one for each GPU, found 3"),
    ],
)
def test_workers_without_gpus_for_them_are_refused(
    monkeypatch: pytest.MonkeyPatch, workers: dict[str, Any], num_gpus: int, message: str
) -> None:
    ray = Ray()
    ray.num_gpus = num_gpus
    with pytest.raises(ConfigError, match=message):
        new_crew(ray, monkeypatch, **workers)._num_workers()


def test_a_cluster_that_stops_answering_while_it_is_joined_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = threading.Event()

    def join(*_: object) -> None:
        answers.wait()
        raise ConfigError("no cluster")

    monkeypatch.setattr(ray_workers, "CONNECT_S", 0.01)
    crew = joining(join, monkeypatch)
    with pytest.raises(WorkersLostError, match="the Ray cluster at head:6379 did not answer"):
        crew.open(SimpleQueue())
    crew.close()
    assert crew._thread.is_alive(), "nobody waits for it"
    answers.set()
    crew._thread.join()


def joining(join: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> RayCrew:
    """Returns a crew that joins a cluster by `join`."""
    monkeypatch.setattr(ray_workers, "join", join)
    ray = Ray()
    monkeypatch.setattr(ray, "_private", SimpleNamespace(worker=SimpleNamespace()), raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: None, raising=False)
    crew = new_crew(ray, monkeypatch, cluster="head:6379")
    crew._actors.clear()
    return crew


def test_whatever_ray_raises_while_it_starts_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def join(*_: object) -> None:
        raise KeyError("no such node")

    crew = joining(join, monkeypatch)
    with pytest.raises(WorkersLostError) as lost:
        crew.open(SimpleQueue())
    crew.close()
    assert str(lost.value) == (
        "the Ray cluster at head:6379 cannot be used: KeyError: 'no such node'"
    )


def test_sigterm_is_taken_back_as_soon_as_ray_has_taken_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    was_taken_back = threading.Event()
    handle = signal.signal

    def take_back(number: int, handler: Any) -> Any:
        was_taken_back.set()
        return handle(number, handler)

    def join(*_: object) -> None:
        assert was_taken_back.wait(60)
        raise ConfigError("no cluster")

    monkeypatch.setattr(signal, "signal", take_back)
    crew = joining(join, monkeypatch)
    with pytest.raises(ConfigError, match="no cluster"):
        crew.open(SimpleQueue())
    crew.close()


def test_nothing_is_asked_of_a_cluster_that_was_left_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = Ray()
    crew = new_crew(ray, monkeypatch, cluster="ray://head")

    def wait(*_: object, **__: object) -> None:
        raise ConnectionError("the client is disconnected")

    def kill(*_: object, **__: object) -> None:
        raise ValueError("ray.kill() only supported for actors")

    monkeypatch.setattr(ray, "wait", wait, raising=False)
    monkeypatch.setattr(ray, "kill", kill, raising=False)
    crew._questions["question"] = (0, 1)
    crew._listen()
    said = crew._events.get()
    assert not isinstance(said, Said)
    with pytest.raises(WorkersLostError, match="can no longer be reached; the same command"):
        said()
    crew.end(0)
    crew.close()


def test_a_cluster_that_is_lost_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = new_crew(Ray(), monkeypatch, cluster="auto")
    monkeypatch.setattr(ClusterWatch, "lost", "the Ray cluster is silent")
    crew._listen()
    said = crew._events.get()
    assert not isinstance(said, Said)
    with pytest.raises(WorkersLostError, match="is silent; the same command resumes the run"):
        said()


def test_ray_is_left_once_nothing_of_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray()
    crew = new_crew(ray, monkeypatch, cluster="auto")
    held_at_shutdown: list[tuple[dict[int, Any], dict[Any, Any]]] = []

    def shutdown() -> None:
        held_at_shutdown.append((dict(crew._actors), dict(crew._questions)))

    monkeypatch.setattr(ray, "shutdown", shutdown, raising=False)
    monkeypatch.setattr(crew, "_connect", lambda: None)
    monkeypatch.setattr(ClusterWatch, "lost", "the Ray cluster is silent")
    crew._questions["question"] = (0, 1)
    crew._thread.start()
    crew._events.get(timeout=60)
    crew._thread.join(0.2)
    assert not held_at_shutdown
    crew.close()
    crew._thread.join()
    assert held_at_shutdown == [({}, {})]


# pytest warns of what a thread raises, and a warning is an error.
def test_a_cluster_that_cannot_be_left_in_order_is_left_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def join(*_: object) -> None:
        raise ConfigError("no cluster")

    def shutdown() -> None:
        left.append(True)
        raise RuntimeError("the cluster does not answer")

    left: list[bool] = []
    crew = joining(join, monkeypatch)
    monkeypatch.setattr(crew._ray, "shutdown", shutdown)
    with pytest.raises(ConfigError, match="no cluster"):
        crew.open(SimpleQueue())
    crew.close()
    crew._thread.join()
    assert left
