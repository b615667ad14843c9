"""Workers as actors of Ray: on this machine, where Ray is started and stopped with the run, or on a
cluster that somebody else has started.

One thread starts or joins Ray, carries the news of all workers, and leaves Ray again. Nobody waits
for it longer than some seconds, whatever becomes of the cluster meanwhile.
"""

from __future__ import annotations

import atexit
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sensebatch.config import WorkersConfig
from sensebatch.contract import Raised
from sensebatch.errors import ConfigError, SensebatchError, WorkersLostError
from sensebatch.executor.guard import guarded, raise_again
from sensebatch.executor.messages import Died, Drew, Joined, News, Order, Said
from sensebatch.executor.ray_actor import RayWorker, Recipe
from sensebatch.executor.ray_signals import leave_to_main_thread, own_sigterm
from sensebatch.executor.ray_start import import_ray, in_a_line, join, new_temp, start_local
from sensebatch.executor.ray_watch import ClusterWatch
from sensebatch.executor.roster import Event

_WAIT_S = 0.1
"""Seconds after which a wait for news looks for workers that were started meanwhile."""
_LOOK_S = 5.0
"""Seconds between two looks at the cluster for machines that were added."""
_DOUBT_S, _AGAIN_S = 40.0, 1.0
"""Seconds until Ray knows what became of a worker that it cannot reach, and between two questions
meanwhile: whether its machine is lost decides if its batch is to blame."""
_SIGNAL_S = 0.02
"""The longest that Ray's own handler of SIGTERM stays while Ray is started."""
CONNECT_S = 90.0
"""Seconds within which Ray has to be started or joined."""
CLOSE_S = 15.0
"""Seconds that it may take to leave it; what the run has started ends with its process anyway."""


class RayCrew:
    """Starts workers with Ray; implements `roster.Crew`.

    Args:
        workers: How many, and where.
        recipe: How each begins.
        uses_gpu: Whether each has a GPU of its own.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, workers: WorkersConfig, recipe: Recipe, *, uses_gpu: bool) -> None:
        self._ray = import_ray()
        self._workers = workers
        self._recipe = recipe
        self._uses_gpu = uses_gpu
        self._temp: Path | None = None
        self._numbers: Sequence[int] = ()
        self._actors: dict[int, Any] = {}
        self._lives: dict[int, int] = {}
        self._places: dict[int, int] = {}
        """How many orders each worker has been given in its life."""
        self._nodes: dict[int, str] = {}
        """The node that each worker was last heard from."""
        self._doubted: dict[int, float] = {}
        """Since when workers cannot be reached."""
        self._again: list[tuple[float, int, int]] = []
        """When to ask which of them next, in which life."""
        self._lock = threading.Lock()
        self._questions: dict[Any, tuple[int, int]] = {}
        """Worker and life of each question for news that is not answered yet."""
        self._is_closing = threading.Event()
        # Ray's processes end with the thread that started them. The process does not wait for it.
        self._thread = threading.Thread(target=self._live, name="ray", daemon=True)
        self._is_connected = threading.Event()
        self._is_lost = False
        """Whether Ray can no longer be asked anything."""
        self._refusal: SensebatchError | None = None
        """Why Ray was neither started nor joined."""

    @property
    def numbers(self) -> Sequence[int]:
        """Numbers of the workers that there is room for at the start."""
        return self._numbers

    def open(self, events: SimpleQueue[Event]) -> None:
        """Starts Ray or joins the cluster, and begins to listen.

        Raises:
            ConfigError: There is no such cluster, or it has no room for the workers.
            WorkersLostError: It no longer answers.
        """
        self._events = events
        with own_sigterm() as take_back:
            self._thread.start()
            end = time.monotonic() + CONNECT_S
            while not self._is_connected.wait(_SIGNAL_S) and time.monotonic() < end:
                take_back()
        if not self._is_connected.is_set():
            raise WorkersLostError(f"{self._name} did not answer within {CONNECT_S:.0f} s")
        if self._refusal is not None:
            raise self._refusal
        self._numbers = range(self._num_workers())

    def start(self, worker: int, life: int) -> None:
        """Starts a worker; the cluster says where."""
        if self._is_cut_off:
            return
        actor_class = self._ray.remote(
            num_gpus=1 if self._uses_gpu else 0,
            num_cpus=0 if self._uses_gpu else 1,
            max_restarts=0,
            max_task_retries=0,
            # One that waits for news, and one for orders.
            max_concurrency=2,
            scheduling_strategy="DEFAULT" if self._uses_gpu else "SPREAD",
        )(RayWorker)
        with self._saying_why(worker, life, "it could not be started"):
            actor = actor_class.remote(worker, self._recipe, max(len(self._numbers), worker + 1))
            with self._lock:
                self._actors[worker], self._lives[worker] = actor, life
                self._places[worker] = 0
                self._doubted.pop(worker, None)
            self._ask(worker, life)

    def tell(self, worker: int, order: Order) -> None:
        """Sends an order; nothing comes of it where the worker is dead."""
        actor, place = self._actors.get(worker), self._places.get(worker, 0)
        if actor is None or self._is_cut_off:
            return
        self._places[worker] = place + 1
        with self._saying_why(worker, self._lives[worker], "an order could not be sent to it"):
            actor.tell.remote(place, order)

    @contextmanager
    def _saying_why(self, worker: int, life: int, what: str) -> Iterator[None]:
        """Says that a worker is of no use if Ray does not take what is for it.

        The listener says so of a cluster that can no longer be reached, a ConnectionError.
        """
        try:
            yield
        except ConnectionError:
            pass
        except (self._ray.exceptions.RayError, OSError) as error:
            self._say(worker, life, Died(reason=f"{what}: {in_a_line(error)}"))

    def end(self, worker: int) -> None:
        """Ends a worker at once, if it is alive."""
        with self._lock:
            actor = self._actors.pop(worker, None)
            self._questions = {
                ref: asked for ref, asked in self._questions.items() if asked[0] != worker
            }
        if actor is not None and not self._is_cut_off:
            with suppress(self._ray.exceptions.RayError, OSError):
                self._ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """Ends all workers, and Ray if the run has started it."""
        for worker in list(self._actors):
            self.end(worker)
        self._is_closing.set()
        if self._thread.is_alive():
            # What is half started here would stay for a minute; nobody waits for a cluster.
            is_here = self._workers.cluster is None
            self._thread.join(CLOSE_S if is_here or self._is_connected.is_set() else 0.0)
        if self._thread.is_alive():
            # It would be waited for where the process ends.
            atexit.unregister(self._ray.shutdown)
        if self._temp is not None:
            shutil.rmtree(self._temp, ignore_errors=True)

    @property
    def _name(self) -> str:
        """What people call the Ray of the run."""
        cluster = self._workers.cluster
        return "Ray on this machine" if cluster is None else f"the Ray cluster at {cluster}"

    @property
    def _is_cut_off(self) -> bool:
        """Whether Ray may no longer be asked anything; the listener says why."""
        return self._is_lost or self._watch.has_ended_here

    def _live(self) -> None:
        """Starts or joins Ray, and leaves it when the crew is closed."""
        raised = guarded(self._try_to_connect)
        if isinstance(raised, Raised):
            failure = raised.failure
            why = f"{failure.type}: {failure.message}"
            self._refusal = WorkersLostError(f"{self._name} cannot be used: {why}")
        self._is_connected.set()
        if self._refusal is None:
            self._listen()
            # Ray ends the process that lets go of an actor or a question while Ray is left.
            self._is_closing.wait()
            self._watch.close()
        # What goes wrong when a lost cluster is left is nobody's concern.
        guarded(self._ray.shutdown)

    def _try_to_connect(self) -> None:
        try:
            self._connect()
        except SensebatchError as error:
            self._refusal = error

    def _connect(self) -> None:
        """Starts Ray or joins the cluster; in the thread that stays."""
        leave_to_main_thread()
        # Ray prints on stdout what it notices of processes that end; the run says that itself.
        self._ray._private.worker.print_worker_logs = lambda *_: None
        # It would start another Ray where it has lost the one it was connected to.
        with suppress(AttributeError):
            self._ray._private.auto_init_hook.enable_auto_connect = False
        if self._workers.cluster is not None:
            join(self._ray, self._workers.cluster)
        else:
            self._temp = new_temp()
            start_local(self._ray, self._workers, uses_gpu=self._uses_gpu, temp=self._temp)
        self._watch = ClusterWatch(self._ray, self._ray.get_runtime_context().get_node_id())

    def _num_workers(self) -> int:
        """Returns how many workers the run has at its start.

        Raises:
            ConfigError: There are too few GPUs for them, and nobody who might add some.
        """
        wanted = self._workers.count
        if not self._uses_gpu:
            return wanted or 1
        num_gpus = self._watch.num_gpus
        where = "this machine" if self._workers.cluster is None else "the cluster"
        if not num_gpus and (wanted is None or self._workers.cluster is None):
            raise ConfigError(f"--gpus: expected GPUs on {where}, found none")
        if wanted is None:
            return num_gpus
        if wanted > num_gpus and self._workers.cluster is None:
            raise ConfigError(
                f"--workers: expected at most {num_gpus}, one for each GPU, found {wanted}"
            )
        return wanted

    def _ask(self, worker: int, life: int) -> None:
        """Asks a worker for news, unless its life is over."""
        with self._lock:
            actor = self._actors.get(worker)
            if actor is None or self._lives[worker] != life:
                return
            question = actor.listen.remote()
            self._questions[question] = (worker, life)

    def _listen(self) -> None:
        """Passes on the news of all workers until the crew is closed."""
        raised = guarded(self._pass_on)
        if isinstance(raised, Raised):
            self._is_lost = True
            self._events.put(partial(raise_again, raised))

    def _pass_on(self) -> None:
        try:
            self._carry_news()
        except OSError as error:
            # Ray says no more than that a line is broken.
            self._require_cluster()
            lost = "the Ray cluster can no longer be reached"
            raise WorkersLostError(f"{lost}; the same command resumes the run") from error

    def _carry_news(self) -> None:
        look_at = time.monotonic() + _LOOK_S
        while not self._is_closing.is_set():
            self._require_cluster()
            with self._lock:
                questions = list(self._questions)
            answered: Sequence[Any] = ()
            if questions:
                answered, _ = self._ray.wait(questions, num_returns=1, timeout=_WAIT_S)
            else:
                self._is_closing.wait(_WAIT_S)
            if answered:
                answered, _ = self._ray.wait(questions, num_returns=len(questions), timeout=0)
            for question in answered:
                self._take_answer(question)
            due = [one for one in self._again if time.monotonic() >= one[0]]
            for one in due:
                self._again.remove(one)
                self._ask(*one[1:])
            if time.monotonic() >= look_at:
                self._look()
                look_at = time.monotonic() + _LOOK_S

    def _require_cluster(self) -> None:
        if (lost := self._watch.lost) is not None:
            raise WorkersLostError(f"{lost}; the same command resumes the run")

    def _take_answer(self, question: Any) -> None:
        with self._lock:
            asked = self._questions.pop(question, None)
        if asked is None:
            return
        worker, life = asked
        self._require_cluster()
        try:
            self._nodes[worker], found = self._ray.get(question)
            news = [_own(one) for one in found]
        except self._ray.exceptions.RayError as error:
            if not self._doubts(worker, life, error):
                died = self._death(worker, error)
                # Ray ends the process that would start a worker again on a machine without it.
                self._require_cluster()
                self._say(worker, life, died)
            return
        if worker in self._doubted:
            lost = "its messages were lost while it could not be reached"
            self._say(worker, life, Died(reason=lost))
            return
        for one in news:
            self._say(worker, life, one)
        self._ask(worker, life)

    def _doubts(self, worker: int, life: int, error: Exception) -> bool:
        """Returns whether Ray may soon know more of a worker that cannot be reached."""
        if not isinstance(error, self._ray.exceptions.ActorUnavailableError):
            return False
        now = time.monotonic()
        self._again.append((now + _AGAIN_S, worker, life))
        return now < self._doubted.setdefault(worker, now) + _DOUBT_S

    def _say(self, worker: int, life: int, news: News) -> None:
        self._events.put(Said(worker=worker, life=life, news=news))

    def _death(self, worker: int, error: Exception) -> Died:
        """Returns what is known of a worker that does not answer."""
        text = str(error)
        node, alive = self._nodes.get(worker), self._watch.alive()
        is_of_node = "node has died" in text or node not in {None, *alive}
        if is_of_node or getattr(error, "preempted", False):
            return Died(reason="its machine left the cluster", is_of_node=True)
        if isinstance(error, self._ray.exceptions.RayTaskError):
            return Died(reason=str(error.cause))
        if "worker process has died" in text:
            return Died(reason="its process was killed, perhaps because the host ran out of memory")
        if isinstance(error, self._ray.exceptions.ActorUnavailableError):
            return Died(reason="its process or its machine can no longer be reached")
        return Died(reason=text)

    def _look(self) -> None:
        """Says which workers there is room for on machines that were added."""
        if self._workers.cluster is not None and self._uses_gpu and self._workers.count is None:
            for worker in range(len(self._numbers), self._watch.num_gpus):
                self._say(worker, 0, Joined())


def _own(news: News) -> News:
    """Returns news with a copy of its images.

    Those that come lie in Ray's memory. To give them back after Ray has ended here, whenever that
    would be, ends the process.
    """
    if not isinstance(news, Drew):
        return news
    drawn = [(index, replace(kept, image=kept.image.copy())) for index, kept in news.drawn]
    return replace(news, drawn=tuple(drawn))
