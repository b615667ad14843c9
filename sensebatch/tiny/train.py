"""Trains the embedded checkpoint: `python -m sensebatch.tiny.train --out DIR`.

A run keeps its state in DIR and continues from there when it is started again. At the end,
DIR/checkpoint is a checkpoint like any other, made of the averaged weights, and DIR/scores.json
has its scores.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sensebatch.checkpoint.architecture import parse_architecture
from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.engine.model.network import Network
from sensebatch.tiny.evaluate import KINDS, evaluate, open_engine, run_config, sample_grid
from sensebatch.tiny.export import export, init_weights, network_config, start_from
from sensebatch.tiny.objective import Kernels, Losses, Objective, ObjectiveConfig, to_device
from sensebatch.tiny.packing import Batches, PackedBatch, PackingConfig
from sensebatch.tiny.vocabulary import WorldTokenizer

STATE_FILE = "state.pt"
LEARNING_RATE = 2e-3
"""The highest learning rate of a run."""
REPORTED = {"cfg 1": {"cfg_scale": 1.0}, "cfg 2": {"cfg_scale": 2.0}}
"""Sampling settings of the reported scores; the second are for t2i and edit alone."""
GRID_COUNT = 64
"""How many samples the grid shows."""
AHEAD = 3
"""How many batches wait on the device."""
MAX_STEPS = 10_000_000
"""Upper bound for the steps of a run that ends by the clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a run learns."""

    seed: int = 0
    minutes: float = 17.0
    """Minutes of training over all starts; evaluation does not count."""
    steps: int | None = None
    """Number of steps that ends the run and shapes its schedule, instead of `minutes`."""
    learning_rate: float = LEARNING_RATE
    final_rate: float = 0.02
    """The last learning rate as a fraction of the highest."""
    warmup_steps: int = 400
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    ema_decay: float = 0.9995
    num_workers: int = 14
    compiled: bool = True
    start: str | None = None
    """The checkpoint that a new run starts from; None for weights that know nothing."""
    packing: PackingConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


class Trainer:
    """A network, its average and the state to continue from.

    Args:
        config: How the network learns.
        device: Where it computes.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.tokenizer = WorldTokenizer()
        self.network_config = network_config(self.tokenizer.vocab_size)
        arch = parse_architecture(self.network_config)
        self.network = Network(arch)
        init_weights(self.network, config.seed)
        if config.start is not None:
            start_from(self.network, open_checkpoint(config.start).path, self.tokenizer.ids)
        self.network.to(device)
        self.average = Network(arch).to(device).requires_grad_(False)
        self.average.load_state_dict(self.network.state_dict())
        self.optimizer = self._new_optimizer()
        self.generator = torch.Generator(device=device)
        self.objective = Objective(
            self.network,
            config.packing,
            config.objective,
            Kernels.compiled() if config.compiled else Kernels(),
        )
        self.step = 0
        self.elapsed_s = 0.0
        """Seconds of training over all starts."""

    def _new_optimizer(self) -> torch.optim.Optimizer:
        decayed: list[nn.Parameter] = []
        free: list[nn.Parameter] = []
        for name, parameter in self.network.named_parameters():
            is_matrix = parameter.ndim >= 2 and not name.endswith(("q_norm", "k_norm"))
            (decayed if is_matrix and "embed_tokens" not in name else free).append(parameter)
        config = self.config
        return torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": free, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
            fused=self.device.type == "cuda",
        )

    @property
    def progress(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        if self.config.steps is not None:
            return min(1.0, self.step / self.config.steps)
        return min(1.0, self.elapsed_s / (60 * self.config.minutes))

    def learning_rate(self) -> float:
        """Returns the learning rate of the next step: linear warmup, then half a cosine."""
        config = self.config
        warm = min(1.0, (self.step + 1) / config.warmup_steps)
        fall = config.final_rate + (1 - config.final_rate) * 0.5 * (
            1 + math.cos(math.pi * self.progress)
        )
        return config.learning_rate * warm * fall

    def train_step(self, batch: PackedBatch) -> Losses:
        """Learns from a batch on the device; noise and timesteps depend on seed and step alone."""
        config = self.config
        self.generator.manual_seed(config.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        autocast = (
            torch.autocast("cuda", dtype=torch.bfloat16)
            if self.device.type == "cuda"
            else nullcontext()
        )
        with autocast:
            losses = self.objective.losses(batch, self.generator)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_average()
        self.step += 1
        return losses

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema_decay, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.network.parameters()), 1 - decay
        )

    def save(self, folder: Path) -> None:
        """Keeps the state. A kill at any moment leaves the old state or the new one."""
        state = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "seed": self.config.seed,
        }
        temporary = folder / f"{STATE_FILE}.tmp"
        torch.save(state, temporary)
        temporary.replace(folder / STATE_FILE)

    def resume(self, folder: Path) -> bool:
        """Continues from a kept state, and returns whether there was one.

        Raises:
            ValueError: The state belongs to a run with another seed.
        """
        file = folder / STATE_FILE
        if not file.exists():
            return False
        state = torch.load(file, map_location=self.device, weights_only=True)
        if state["seed"] != self.config.seed:
            raise ValueError(
                f"{file}: expected a run with seed {self.config.seed}, found {state['seed']}"
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        return True

    def export(self, folder: Path) -> None:
        """Writes the averaged weights as a checkpoint."""
        export(folder, self.network_config, self.average)

    def batches(self) -> Iterator[PackedBatch]:
        """Yields the batches from the next step on, on the device."""
        config = self.config
        batches = Batches(
            seed=config.seed,
            first_step=self.step,
            num_steps=(config.steps or MAX_STEPS) - self.step,
            tokenizer=self.tokenizer,
            config=config.packing,
        )
        workers = config.num_workers
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
        pickled = iter(loader)
        moved = (to_device(pickle.loads(one), self.device) for one in pickled)
        return ahead(moved, AHEAD) if workers else moved


def ahead(batches: Iterator[PackedBatch], count: int) -> Generator[PackedBatch]:
    """Yields batches that a thread makes, up to `count` of them ahead.

    To unpickle a batch and to copy it takes as long as to start the kernels of a step.
    """
    made: Queue[PackedBatch | BaseException | None] = Queue(count)
    stopped = Event()

    def make() -> None:
        last = None
        try:
            for batch in batches:
                made.put(batch)
                if stopped.is_set():
                    return
        except BaseException as error:
            last = error
        made.put(last)

    thread = Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while isinstance(found := made.get(), PackedBatch):
            yield found
        if found is not None:
            raise found
    finally:
        stopped.set()
        while thread.is_alive():
            with suppress(Empty):
                made.get(timeout=0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """When a session reports, keeps its state and evaluates."""

    session_s: float = math.inf
    """Seconds after which the session stops, with its state kept."""
    log_steps: int = 50
    """Steps between two progress lines."""
    save_s: float = 120.0
    """Seconds between two kept states."""
    evaluate_s: float = 240.0
    """Seconds of training between two short evaluations."""
    short_count: int = 48
    """Held-out examples of each kind in a short evaluation."""


@dataclass(slots=True)
class _Meter:
    """Sums up steps between two progress lines, on the device, so that no step waits for it."""

    sums: Tensor
    started: float
    steps: int = 0
    images: int = 0
    waited_s: float = 0.0

    def add(self, losses: Losses, images: int) -> None:
        self.sums += torch.stack(
            [loss.detach() for loss in (losses.velocity, losses.image, losses.text, losses.answer)]
        )
        self.steps += 1
        self.images += images

    def line(self, trainer: Trainer) -> str:
        velocity, image, text, answer = (self.sums / self.steps).tolist()
        seconds = time.perf_counter() - self.started
        return (
            f"step {trainer.step} {100 * trainer.progress:.1f}% velocity {velocity:.5f} "
            f"image {image:.5f} text {text:.4f} answer {answer:.4f} "
            f"lr {trainer.learning_rate():.2e} "
            f"{self.images / seconds:.0f} images/s waiting {100 * self.waited_s / seconds:.0f}%"
        )


def run(trainer: Trainer, folder: Path, plan: RunPlan) -> None:
    """Trains to the end or for a session; keeps the state, prints progress and scores.

    Args:
        trainer: Is new or resumed.
        folder: The run's folder.
        plan: When to report, keep the state and evaluate.
    """
    meter = _new_meter(trainer)
    began = saved = evaluated = last = time.perf_counter()
    for batch in trainer.batches():
        meter.waited_s += time.perf_counter() - last
        meter.add(trainer.train_step(batch), len(batch.drawn_slot))
        if trainer.step % plan.log_steps == 0:
            print(meter.line(trainer), flush=True)
            meter = _new_meter(trainer)
        now = time.perf_counter()
        # The first step of a session compiles; its time is not training.
        trainer.elapsed_s += 0.0 if last == began else now - last
        if trainer.progress >= 1 or now - began > plan.session_s:
            break
        if now - saved > plan.save_s:
            trainer.save(folder)
            trainer.export(folder / "checkpoint")
            saved = time.perf_counter()
        if now - evaluated > plan.evaluate_s:
            report(trainer, folder, plan.short_count, square=True)
            evaluated = time.perf_counter()
            meter = _new_meter(trainer)
        last = time.perf_counter()
    trainer.save(folder)


def _new_meter(trainer: Trainer) -> _Meter:
    return _Meter(sums=torch.zeros(4, device=trainer.device), started=time.perf_counter())


def report(trainer: Trainer, folder: Path, count: int, *, square: bool) -> None:
    """Exports the average, prints and writes its held-out scores, and draws a grid of samples.

    Args:
        trainer: The run's trainer.
        folder: The run's folder.
        count: Examples of each kind.
        square: Whether all images are square, which is faster.
    """
    checkpoint = folder / "checkpoint"
    trainer.export(checkpoint)
    content: dict[str, Any] = {"step": trainer.step}
    start = time.perf_counter()
    for name, sampling in REPORTED.items():
        config = run_config(device=trainer.device.type, sampling=sampling)
        engine = open_engine(str(checkpoint), config)
        is_first = name == next(iter(REPORTED))
        kinds = KINDS if is_first else ("t2i", "edit")
        scores = evaluate(engine, config, dict.fromkeys(kinds, count), square=square)
        for kind, values in scores.items():
            print(f"scores step {trainer.step} {name} {kind}: {values.line()}", flush=True)
        content[name] = {kind: values.as_dict() for kind, values in scores.items()}
        if is_first:
            sample_grid(engine, config, GRID_COUNT).save(folder / "grid.png")
    print(f"evaluated in {time.perf_counter() - start:.1f} s", flush=True)
    text = json.dumps(content, indent=1) + "\n"
    (folder / "scores.json").write_text(text, encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run continues.")],
    minutes: Annotated[float, typer.Option(help="Minutes of training, over all sessions.")] = 17.0,
    session_minutes: Annotated[
        float, typer.Option(help="Minutes after which to stop; start it again to continue.")
    ] = math.inf,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of minutes.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    rows: Annotated[int, typer.Option(help="Rows of a batch with images to be drawn.")] = 64,
    question_rows: Annotated[int, typer.Option(help="Rows of a batch with questions.")] = 192,
    learning_rate: Annotated[float, typer.Option()] = LEARNING_RATE,
    warmup_steps: Annotated[int, typer.Option()] = 400,
    workers: Annotated[int, typer.Option(help="Processes that make batches.")] = 14,
    start: Annotated[
        str | None, typer.Option(help="Checkpoint to start a new run from, such as tiny.")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    evaluate_minutes: Annotated[
        float, typer.Option(help="Between short evaluations, minutes.")
    ] = 4.0,
    short_count: Annotated[int, typer.Option(help="Examples of a short evaluation.")] = 48,
    final_count: Annotated[int, typer.Option(help="Examples of the last evaluation.")] = 100,
) -> None:
    """Trains the embedded checkpoint on its small world and scores it."""
    config = TrainConfig(
        seed=seed,
        minutes=minutes,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        num_workers=workers,
        compiled=compile_,
        start=start,
        packing=PackingConfig(num_rows=rows, question_rows=question_rows),
    )
    plan = RunPlan(
        session_s=60 * session_minutes,
        evaluate_s=60 * evaluate_minutes,
        short_count=short_count,
    )
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, torch.device(device))
    resumed = trainer.resume(out)
    print("resumed at" if resumed else "new run,", "step", trainer.step, asdict(config), flush=True)
    if trainer.progress < 1:
        run(trainer, out, plan)
    ended = trainer.progress >= 1
    report(trainer, out, final_count if ended else short_count, square=not ended)
    print("ended" if ended else "stopped; start again to continue", flush=True)


if __name__ == "__main__":
    typer.run(main)
