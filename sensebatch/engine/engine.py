"""The engine: a loaded model that turns a batch of jobs into images and text."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from sensebatch.checkpoint.card import model_license
from sensebatch.checkpoint.files import Checkpoint
from sensebatch.checkpoint.tokenizer import IMG_START
from sensebatch.config import RunConfig
from sensebatch.contract import Channel, Following, HostShare, Kept, Phase, Reading
from sensebatch.engine.device.memory import (
    DevicePeak,
    cap_device_memory,
    check_device,
    empty_cache,
    is_out_of_memory,
    plan_placements,
)
from sensebatch.engine.device.runtime import (
    DTYPES,
    check_precision,
    new_attention,
    resolve_attention,
    resolve_fused,
)
from sensebatch.engine.memory.host import BLOCKS
from sensebatch.engine.memory.lanes import lane_for
from sensebatch.engine.memory.pages import Pages
from sensebatch.engine.memory.places import Places
from sensebatch.engine.memory.shared import can_share, taken_bytes
from sensebatch.engine.memory.shelf import Shelf
from sensebatch.engine.model.attention import Attention
from sensebatch.engine.model.kv_cache import KVCache
from sensebatch.engine.model.network import Network
from sensebatch.engine.model.steps import Paced
from sensebatch.engine.model.tokenizer import HFTokenizer, Tokenizer
from sensebatch.engine.preprocess import load_input
from sensebatch.engine.runner import CachedPrompts, PassLimits, Runner
from sensebatch.engine.sampling.text import Script
from sensebatch.engine.tasks.noise import NoiseAhead
from sensebatch.engine.tasks.registry import Written, runner_of
from sensebatch.engine.tasks.state import PreparedJob, prepare_job, read_ahead
from sensebatch.engine.weights.loader import NetworkLoader, open_weights, warm_up
from sensebatch.engine.weights.residency import EMBEDDINGS, Residency
from sensebatch.errors import (
    CheckpointError,
    DoesNotFitError,
    OutOfMemoryError,
    RunStoppedError,
    SensebatchError,
)
from sensebatch.jobs import (
    Batch,
    BatchMetrics,
    BatchResult,
    EngineInfo,
    Failure,
    GroupKey,
    Job,
    JobResult,
    ModelIdentity,
    group_key,
)
from sensebatch.plan.fallback import keeping, leaner
from sensebatch.plan.load import Load
from sensebatch.plan.passes import prefixes_wait
from sensebatch.plan.placement import Placement, Placements
from sensebatch.plan.weight_bytes import weight_bytes
from sensebatch.process import peak_rss_bytes
from sensebatch.resolutions import PixelLimits
from sensebatch.tasks import Task

PINNED_PIXEL_BYTES = 192 << 20
"""Most pinned memory for pixels until they are written: of four batches by default. If a disk is so
far behind that more wait, they wait in ordinary memory."""


class SenseNovaEngine:
    """Implements `contract.Engine` with a network that computes on one device.

    Args:
        loader: Loads the network again when memory runs out.
        loaded: The network and what moves its weights.
        placements: Where the weights are while each group runs; they are loaded as the first says.
        tokenizer: The one of the same checkpoint.
        attention: How one run or image attends.
        pixel_limits: Sizes of input images.
        info: What the log says of the engine.
        script: What jobs write, for synthetic weights.
    """

    def __init__(
        self,
        *,
        loader: NetworkLoader,
        loaded: tuple[Network, Residency],
        placements: Placements,
        tokenizer: Tokenizer,
        attention: Attention,
        pixel_limits: PixelLimits,
        info: EngineInfo,
        script: Script | None = None,
    ) -> None:
        self._loader = loader
        self._placements = placements
        self._group: GroupKey | None = None
        self._network, self._residency = loaded
        self._tokenizer = tokenizer
        self._attention = attention
        self._pixel_limits = pixel_limits
        self._info = info
        self._script = script
        lane = lane_for(loader.device) if loader.device.type == "cuda" else None
        self._shelf = None if lane is None else Shelf(pin=True)
        self._pixels = None if lane is None else Places(lane, PINNED_PIXEL_BYTES)
        self._pages = Pages(pin=loader.device.type == "cuda")
        self._system_turns: dict[tuple[int, ...], KVCache] = {}
        self._idle_since: float | None = None
        self._written: dict[str, Written] = {}
        """Batches whose texts are written and wait, by their ids."""
        self._ahead = NoiseAhead() if lane is None else NoiseAhead(take=Places(lane).take)

    @property
    def info(self) -> EngineInfo:
        """What the log says of the engine."""
        return self._info

    def prepare(self, job: Job, inputs: Sequence[bytes]) -> PreparedJob:
        """Returns what can be made of a job on the host; see `contract.Engine.prepare`."""
        if (message := self._placements.refusal(job)) is not None:
            raise DoesNotFitError(message)
        system = job.system_prompt
        if system is None:
            system = self._info.identity.system_prompt(job.task)
        images = [
            load_input(
                data,
                f"input image {number}",
                num_images=len(inputs),
                first_max_pixels=job.input_max_pixels,
                limits=self._pixel_limits,
                draws=job.task.spec.drawing is not None,
                planned=image,
            )
            for number, (image, data) in enumerate(zip(job.images, inputs, strict=True), start=1)
        ]
        # Not the network's, which another thread may be loading again.
        arch = self._loader.arch
        return prepare_job(
            arch,
            self._tokenizer,
            job,
            system_prompt=system,
            images=images,
            ahead=self._ahead,
        )

    def read(self, prepared: Sequence[PreparedJob]) -> Paced[CachedPrompts] | None:
        """Begins to read the prompts of the next batch; see `contract.Engine.read`."""
        assert self._group is not None
        following = group_key(prepared[0].job)
        if not self._residency.is_whole or not self._placements.reads_ahead(self._group, following):
            return None
        runner = Runner(
            network=self._network,
            tokenizer=self._tokenizer,
            attention=self._attention,
            system_turns=self._system_turns,
        )
        return read_ahead(runner, prepared)

    def num_following(self, group: GroupKey, batch: str | None = None) -> int:
        """Returns how many batches can be written beside one; see `contract.Engine`."""
        if batch in self._written or runner_of(group.task).together is None:
            return 0
        return self._placements.of(group).text_batches - 1

    def generate(
        self,
        batch: Batch,
        prepared: Sequence[PreparedJob],
        *,
        kept: Kept,
        channel: Channel,
        reading: Reading | None = None,
        following: Following = (),
    ) -> BatchResult:
        """Runs a batch; see `contract.Engine.generate`."""
        assert reading is None or isinstance(reading, Paced)
        device = self._network.device
        try:
            self._settle(batch.group)
        except RuntimeError as error:
            # The device failed after the last batch.
            check_device(device, error)
            raise
        memory = DevicePeak(device)
        runner = self._new_runner(batch, channel, reading)
        start = time.perf_counter()
        # Unknown after a batch that raises, since nobody knows how far the device came.
        idle_since, self._idle_since = self._idle_since, None
        try:
            with torch.inference_mode():
                written = self._write(runner, batch, prepared, following)
                results = self._run(runner, batch, prepared, written, kept=kept, channel=channel)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                check_device(device, error)
                raise
            message = str(error).splitlines()[0]
        except OutOfMemoryError as error:
            # Weights that made room for text, or were to come back after it, found no memory.
            message = str(error)
        except CheckpointError as error:
            raise RunStoppedError(f"the weights can no longer be read: {error}") from error
        else:
            return BatchResult(
                results=results, metrics=self._metrics(runner, memory, start, idle_since)
            )
        # Outside the handler, where no traceback keeps the batch's tensors alive.
        del runner
        self._free_after(batch)
        raise OutOfMemoryError(
            f"a batch of {len(batch.jobs)} ({batch.group}) did not fit: {message}"
        )

    def _free_after(self, batch: Batch) -> None:
        """Frees what waits on the device, or beside it, after a batch that did not fit."""
        self._system_turns.clear()
        self._written.clear()
        if self._placement.text_bytes is not None:
            # Its texts may be what did not fit, and would not fit again.
            alone = replace(self._placement, text_batches=1, text_bytes=None)
            self._continue_with(self._placements.replacing(batch.group, alone))
        empty_cache(self._network.device)

    def _metrics(
        self, runner: Runner, memory: DevicePeak, start: float, idle_since: float | None
    ) -> BatchMetrics:
        """Returns what a batch that began at `start` cost, and notes when its work ended."""
        allocated, reserved = memory.read()
        # Nothing is left to do of a batch that only wrote, beside one before.
        first_work, self._idle_since = runner.worked or (start, start)
        return BatchMetrics(
            wait_s=None if idle_since is None else first_work - idle_since,
            prefill_s=runner.seconds[Phase.PREFILL],
            think_s=runner.seconds[Phase.THINK],
            denoise_s=runner.seconds[Phase.DENOISE],
            num_denoise_steps=runner.num_denoise_steps,
            num_kept_images=runner.num_kept_images,
            total_s=time.perf_counter() - start,
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
        )

    def _new_runner(
        self, batch: Batch, channel: Channel, reading: Paced[CachedPrompts] | None = None
    ) -> Runner:
        limits = self._limits(batch)
        draws_once = runner_of(batch.group.task).draws_once(batch, limits)
        runner = Runner(
            network=self._network,
            tokenizer=self._tokenizer,
            attention=self._attention,
            progress=channel.progress,
            weights=self._residency,
            limits=replace(limits, draws_once=draws_once),
            system_turns=self._system_turns,
            stop=channel.is_stopped,
        )
        runner.observe = channel.observe
        runner.reading_ahead = reading
        if self._shelf is not None:
            runner.copy_images = self._shelf.copy
        if self._pixels is not None:
            runner.copy_pixels = self._pixels.bring
        return runner

    def _limits(self, batch: Batch) -> PassLimits:
        limits = PassLimits(image_tokens=self._placement.tokens_per_pass)
        drawing = batch.group.drawing
        if drawing is None or not self._placement.park_caches:
            return limits
        if prefixes_wait(len(batch.jobs), limits.together(drawing.resolution)):
            return replace(limits, park=self._pages.take)
        return limits

    def _write(
        self,
        runner: Runner,
        batch: Batch,
        prepared: Sequence[PreparedJob],
        following: Following,
    ) -> Written | None:
        """Returns what is written of a batch, or is written now beside others.

        None where a batch writes its text in the course of `_run`.
        """
        together = runner_of(batch.group.task).together
        written = self._written.pop(batch.id, None)
        if written is not None:
            return written
        # They expected another order.
        self._written.clear()
        if together is None or self._placement.text_bytes is None:
            return None
        others = following[: self._placement.text_batches - 1]
        runner.limits = replace(
            runner.limits, park=self._pages.take, text_bytes=self._placement.text_bytes
        )
        jobs = [_fresh(prepared), *(_fresh(of_other) for _, of_other in others)]
        written, *waiting = together.write(runner, jobs, self._script)
        self._written = {
            other.id: of_other for (other, _), of_other in zip(others, waiting, strict=True)
        }
        return written

    def largest_batch(self, group: GroupKey) -> int | None:
        """Returns how many jobs fit together; see `contract.Engine.largest_batch`."""
        return self._placements.of(group).batch_size

    def _settle(self, group: GroupKey) -> None:
        """Gives weights the memory that they have while a group runs, or as much as there is."""
        # Set first, so that room can be made for the group if this fails.
        self._group = group
        wanted = self._placement.num_buffers
        placements = self._placements
        if wanted is not None and (kept := self._residency.resize(wanted)) != wanted:
            less = keeping(self._loader.computation, self._placement, kept)
            placements = placements.replacing(group, less)
        self._continue_with(placements)

    def _continue_with(self, placements: Placements) -> None:
        self._placements = placements
        self._info = replace(self._info, vram_mode=self._placement.mode)

    @property
    def _placement(self) -> Placement:
        """The placement of the group that runs, or ran last."""
        return self._placements.first if self._group is None else self._placements.of(self._group)

    def replan(
        self,
        config: RunConfig,
        *,
        loads: Sequence[Load],
        stop: Callable[[], bool],
    ) -> None:
        """Plans memory again, for another run of the same model.

        Weights that are already where the new plan has them stay; otherwise they are loaded again.

        Args:
            config: The run's memory settings and the sizes of its input images.
            loads: One for each group of the run.
            stop: Whether to stop loading.

        Raises:
            StoppedError: The load was stopped; the engine can no longer be used.
            ConfigError: The jobs do not fit the memory; the engine is as it was.
            CheckpointError: The weights cannot be read again; the engine can no longer be used.
            OutOfMemoryError: The device has less memory than it said; likewise.
        """
        start = time.perf_counter()
        device = self._loader.device
        self._system_turns.clear()
        self._written.clear()
        empty_cache(device)
        placements = plan_placements(
            self._loader.computation,
            memory=config.memory,
            device=device,
            loads=loads,
            held_host_bytes=self._held_host_bytes(),
        )
        self._pixel_limits = config.pixel_limits
        stays = self._residency.suits(placements.first)
        # What an earlier run had may be more than this one's budget.
        if not stays:
            self._unload()
        elif placements.first.num_buffers is not None:
            self._residency.resize(placements.first.num_buffers)
        cap_device_memory(device, config.memory.vram_budget_bytes)
        memory = DevicePeak(device)
        compile_s = warm_up(self._loader, self._attention, placements.fitted(loads))
        if not stays:
            self._network, self._residency = self._loader.load(placements.first, stop)
        self._group, self._idle_since = None, None
        self._placements = placements
        self._info = replace(
            self._info,
            vram_mode=placements.first.mode,
            budget_bytes=config.memory.vram_budget_bytes,
            compile_s=compile_s,
            refusals=placements.refusals(),
            **_load_figures(start, memory),
        )

    def _held_host_bytes(self) -> int:
        """Returns the bytes of host memory that weights take: on a CPU, all of them."""
        if not self._residency.is_whole or self._loader.device.type != "cpu":
            return self._residency.host_bytes
        weights = weight_bytes(self._loader.computation)
        return weights.blocks + weights.embeddings + weights.rest

    def close(self) -> None:
        """Frees the weights; the engine can no longer be used."""
        self._ahead.close()
        self._system_turns.clear()
        self._written.clear()
        # After a failed load there are none, and a device that failed frees nothing.
        with suppress(AttributeError, RuntimeError):
            self._unload()

    def _unload(self) -> None:
        """Frees the weights, so that there is room to load them again."""
        del self._network, self._residency
        empty_cache(self._loader.device)

    def make_room(self) -> str | None:
        """Continues with less memory; see `contract.Engine.make_room`."""
        assert self._group is not None
        after = leaner(self._loader.computation, self._placements, self._group)
        if after is None:
            return None
        self._continue_with(after)
        if self._residency.is_whole:
            # No block is in host memory, so all are read from the files again.
            self._unload()
            try:
                self._network, self._residency = self._loader.load(self._placement)
            except (RuntimeError, SensebatchError) as error:
                raise RunStoppedError(
                    f"memory ran out and the weights could not be loaded again: {error}; "
                    "a lower --vram-mode may help"
                ) from error
        return self._placement.reason

    def _run(
        self,
        runner: Runner,
        batch: Batch,
        prepared: Sequence[PreparedJob],
        written: Written | None,
        *,
        kept: Kept,
        channel: Channel,
    ) -> tuple[JobResult | Failure, ...]:
        of_task = runner_of(batch.group.task)
        if written is not None:
            assert of_task.together is not None
            return tuple(of_task.together.finish(runner, written, kept, channel))
        jobs = _fresh(prepared)
        return tuple(of_task.run(runner, jobs, kept=kept, channel=channel, script=self._script))


def _fresh(prepared: Sequence[PreparedJob]) -> list[PreparedJob]:
    """Returns jobs with generators of their own, so that they can be run again."""
    return [replace(job, generator=job.generator.clone_state()) for job in prepared]


def synthetic_text(tokenizer: Tokenizer) -> Script:
    """Returns what jobs write with synthetic weights, in the words of a tokenizer."""
    (word, *_) = tokenizer.encode(" and")
    return Script(word=word, image_start=tokenizer.token_id(IMG_START))


def load_engine(
    config: RunConfig,
    *,
    checkpoint: Checkpoint,
    identity: ModelIdentity,
    system_prompt_source: Mapping[Task, str],
    device: str,
    loads: Sequence[Load] = (),
    stop: Callable[[], bool] = lambda: False,
    share: HostShare | None = None,
) -> SenseNovaEngine:
    """Loads a model for a run.

    Args:
        config: Model, attention and memory settings.
        checkpoint: The model's files.
        identity: What job keys were made with; its dtype and precision are loaded.
        system_prompt_source: Where each task's system prompt was found; for the log.
        device: What `choice.resolve_runtime` returned.
        loads: One for each group of the run; memory is planned for them.
        stop: Whether to stop loading.
        share: How the host is shared with the run's other workers on it; None without any.

    Raises:
        StoppedError: The load was stopped.
        CheckpointError: The checkpoint, its tokenizer or the LoRA does not fit.
        ConfigError: The attention backend or the precision cannot be used, or the jobs do not
            fit the memory.
        DeviceError: The device unpacks other weights than were packed.
        OutOfMemoryError: The device has less memory than it said.
    """
    start = time.perf_counter()
    where = torch.device(device)
    backend = resolve_attention(config.model.attn_backend, device, identity.dtype)
    key = _share_key(share, identity)
    loader = _new_loader(config, checkpoint=checkpoint, device=where, identity=identity, share=key)
    placements = _first_placements(loader, config, loads, share)
    tokenizer = HFTokenizer(checkpoint.path)
    cap_device_memory(where, config.memory.vram_budget_bytes)
    attention = new_attention(backend, device, fused=loader.fused)
    compile_s = warm_up(loader, attention, placements.fitted(loads))
    peak = DevicePeak(where)
    loaded = loader.load(placements.first, stop)
    info = EngineInfo(
        identity=identity,
        model=config.model.model,
        model_license=model_license(checkpoint.path),
        system_prompt_source=system_prompt_source,
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        dtype=identity.dtype,
        attn_backend=backend,
        compile_s=compile_s,
        vram_mode=placements.first.mode,
        budget_bytes=config.memory.vram_budget_bytes,
        torch_version=str(torch.__version__),  # which brings torch along where it is unpickled
        refusals=placements.refusals(),
        **_load_figures(start, peak),
    )
    return SenseNovaEngine(
        loader=loader,
        loaded=loaded,
        placements=placements,
        tokenizer=tokenizer,
        attention=attention,
        pixel_limits=config.pixel_limits,
        info=info,
        script=synthetic_text(tokenizer) if checkpoint.synthetic else None,
    )


def _first_placements(
    loader: NetworkLoader, config: RunConfig, loads: Sequence[Load], share: HostShare | None
) -> Placements:
    return plan_placements(
        loader.computation,
        memory=config.memory,
        device=loader.device,
        loads=loads,
        num_workers=1 if share is None else share.num_workers,
        held_host_bytes=taken_bytes(loader.share, BLOCKS, EMBEDDINGS),
    )


def _load_figures(start: float, peak: DevicePeak) -> dict[str, Any]:
    """Returns what the log says of a load that began at `start`."""
    allocated, reserved = peak.read()
    return {
        "load_s": time.perf_counter() - start,
        "load_peak_allocated_bytes": allocated,
        "load_peak_reserved_bytes": reserved,
        "load_peak_rss_bytes": peak_rss_bytes(),
    }


def _share_key(share: HostShare | None, identity: ModelIdentity) -> str | None:
    """Returns what workers have in common if they share a host and stream the same weights."""
    if share is None or share.num_workers == 1 or not can_share():
        # Memory of its own comes in huge pages, which are filled and pinned faster.
        return None
    content = (share.name, identity.checkpoint, identity.lora, identity.dtype, identity.precision)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:32]


def _new_loader(
    config: RunConfig,
    *,
    checkpoint: Checkpoint,
    device: torch.device,
    identity: ModelIdentity,
    share: str | None,
) -> NetworkLoader:
    check_precision(identity.precision, device.type, identity.dtype)
    dtype = DTYPES[identity.dtype]
    return NetworkLoader(
        arch=checkpoint.architecture,
        source=open_weights(checkpoint, config.model.lora_path, dtype),
        device=device,
        dtype=dtype,
        fused=resolve_fused(config.model.compile, device.type, checkpoint.architecture),
        precision=identity.precision,
        share=share,
    )
