"""A calibration of the embedded checkpoint with few steps, stopped and resumed."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from PIL import Image

from sensebatch.calibrate.files import claim_folder, config_name, write_files
from sensebatch.calibrate.run import AS_IT_IS, Calibration, Scale, Variant, Verdict, chosen_jobs
from sensebatch.calibrate.run import _variant as variant_of
from sensebatch.calibrate.trace import _products as products_of
from sensebatch.calibrate.trace import _TracingEngine, read_trace
from sensebatch.config import NEUTRAL, PRESETS, converged_timesteps, default_config
from sensebatch.contract import Channel, Kept, KeptImage
from sensebatch.errors import ConfigError, RunFolderError
from sensebatch.jobs import (
    Batch,
    BatchMetrics,
    BatchResult,
    Job,
    JobResult,
    Quality,
    Solver,
    group_key,
)
from sensebatch.loading import Backend, ReusableEngine
from sensebatch.manifest.read import read_rows
from sensebatch.session import Request, run_session
from sensebatch.settings import resolve_settings
from sensebatch.store.finished import finished_jobs
from sensebatch.tasks import Task
from tests.executor.fakes import make_job

SCALE = Scale(max_jobs=4, num_steps=(6, 3), converged_steps=24)
CONFIG = default_config()
MANIFESTS = (Path("jobs.yaml"),)
ROWS = [
    {"id": f"circle-{colour}", "prompt": f"A {colour} circle on a white background"}
    for colour in ("red", "blue", "green", "yellow")
]


def _jobs(rows: Sequence[Mapping[str, Any]]) -> list[Job]:
    return list(read_rows(rows, CONFIG, path=Path("rows")))


def _run(request: Request, backend: Backend) -> bool:
    counts = run_session(request, backend).counts
    return counts.done == counts.jobs


class _Once:
    """Runs one folder, and then stops."""

    def __init__(self) -> None:
        self.roots: list[Path] = []

    def __call__(self, request: Request, backend: Backend) -> bool:
        self.roots.append(request.root)
        return len(self.roots) == 1 and _run(request, backend)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Verdict]]:
    """A calibration that was stopped after its first run, and then continued."""
    folder = tmp_path_factory.mktemp("calibration")
    once = _Once()
    stopped = Calibration(folder, CONFIG, SCALE, run_jobs=once).calibrate(_jobs(ROWS))
    assert stopped is None
    assert [root.name for root in once.roots] == ["t2i", "judged"]
    verdicts = Calibration(folder, CONFIG, SCALE, run_jobs=_run).calibrate(_jobs(ROWS))
    assert verdicts is not None
    return folder, verdicts


@pytest.mark.slow
def test_half_of_the_jobs_decide_and_the_others_are_searched(
    made: tuple[Path, list[Verdict]],
) -> None:
    folder, (verdict,) = made
    assert (verdict.task, verdict.num_judged) == (Task.T2I, 2)
    searched = {done.job.id for done in finished_jobs(folder / "converged" / "t2i")}
    assert searched == {"circle-red", "circle-green"}
    judged = {done.job.prompt for done in finished_jobs(folder / "judged")}
    assert judged == {ROWS[1]["prompt"], ROWS[3]["prompt"]}


@pytest.mark.slow
def test_every_way_is_judged_with_its_evaluations(made: tuple[Path, list[Verdict]]) -> None:
    _, (verdict,) = made
    found = {variant.name: variant.evaluations for variant in verdict.variants}
    assert found == {
        AS_IT_IS: 8,
        "quality exact": 50,
        "quality high": 23,
        "quality fast": 15,
        "found, euler, 6": 6,
        "found, ab2, 6": 6,
        # Four whole steps, and four that are a third each.
        "found, euler, 8, layers 3": 5,
        "found, euler, 3": 3,
        "found, ab2, 3": 3,
    }
    # Two jobs decide; converged are they and the two others.
    total = 4 * SCALE.converged_steps + 2 * sum(found.values())
    calibration = Calibration(Path("unused"), CONFIG, SCALE, run_jobs=_run)
    assert calibration.evaluations(_jobs(ROWS)) == {Task.T2I: total}
    by_name = {variant.name: variant for variant in verdict.variants}
    assert by_name["found, euler, 3"].psnr_db < by_name["found, euler, 6"].psnr_db
    assert all(variant.image_s > 0 for variant in verdict.variants)
    assert verdict.best(6).psnr_db == max(
        by_name[name].psnr_db for name in found if found[name] <= 6
    )


@pytest.mark.slow
def test_the_record_has_the_products_of_the_velocities(made: tuple[Path, list[Verdict]]) -> None:
    folder, _ = made
    timesteps = converged_timesteps(SCALE.converged_steps)
    ids = ["circle-red", "circle-green"]
    trace = read_trace(folder / "converged" / "t2i" / "velocities", timesteps, ids)
    assert trace.times.tolist() == [0.0, *timesteps, 1.0]
    assert trace.products.shape == (24, 24)
    np.testing.assert_allclose(trace.products, trace.products.T, rtol=1e-9)
    lengths = np.sqrt(np.diagonal(trace.products))
    assert (np.abs(trace.products) <= lengths[:, None] * lengths * (1 + 1e-9)).all()


@pytest.mark.slow
def test_the_files_say_what_was_found(made: tuple[Path, list[Verdict]], tmp_path: Path) -> None:
    _, verdicts = made
    files = write_files(
        tmp_path, verdicts, (6, 3), manifests=MANIFESTS, model="tiny", made_by="today"
    )
    assert [file.name for file in files] == [
        "6-steps.yaml",
        "3-steps.yaml",
        "sheet.png",
        "calibration.json",
    ]
    sampling = resolve_settings(config_file=tmp_path / config_name(6)).tasks[Task.T2I].sampling
    best = verdicts[0].best(6)
    assert (sampling.num_steps, sampling.solver) == (
        best.settings["num_steps"],
        best.settings["solver"],
    )
    assert sampling.timesteps == pytest.approx(best.settings["timesteps"], abs=1e-6)
    figures = json.loads((tmp_path / "calibration.json").read_text())
    names = [variant["name"] for variant in figures["tasks"]["t2i"]["variants"]]
    assert names == [variant.name for variant in verdicts[0].variants]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 9 * 176


def test_a_preset_that_wins_is_written_as_its_settings(tmp_path: Path) -> None:
    preset = {**NEUTRAL, **PRESETS[Quality.FAST]}
    tile = (Image.new("RGB", (32, 32)), "a")
    variant = _variant("quality fast", preset, 50.0)
    base = replace(_variant(AS_IT_IS, {**preset, "num_steps": 60}, 90.0), steps=60)
    verdict = Verdict(task=Task.T2I, num_judged=1, variants=(base, variant), sheet=(tile,))
    write_files(tmp_path, [verdict], (16,), manifests=MANIFESTS, model="tiny", made_by="today")
    sampling = resolve_settings(config_file=tmp_path / "16-steps.yaml").tasks[Task.T2I].sampling
    assert (sampling.num_steps, sampling.timestep_shift, sampling.layer_stride) == (22, 1.0, 2)
    assert (sampling.solver, sampling.timesteps) == (Solver.EULER, ())


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_folder_holds_one_calibration(tmp_path: Path, is_finished: bool) -> None:
    claim_folder(tmp_path, MANIFESTS, "tiny")
    if is_finished:
        variant = _variant(AS_IT_IS, {**NEUTRAL, **PRESETS[Quality.FAST]}, 50.0)
        tile = (Image.new("RGB", (32, 32)), "a")
        verdict = Verdict(task=Task.T2I, num_judged=1, variants=(variant,), sheet=(tile,))
        write_files(tmp_path, [verdict], (16,), manifests=MANIFESTS, model="tiny", made_by="today")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    claim_folder(tmp_path, [Path("other") / ".." / "jobs.yaml"], "tiny")
    jobs, others = Path("jobs.yaml").absolute(), Path("others.yaml").absolute()
    held = f"{tmp_path}: holds the calibration of tiny with {jobs}, found "
    for manifest, model in ((others, "tiny"), (jobs, "some/model")):
        message = f"{held}{model} with {manifest}; choose another --output-dir"
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            claim_folder(tmp_path, [manifest], model)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": "tiny"}'])
def test_a_folder_with_other_figures_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(ConfigError, match="holds the calibration of something else, found tiny"):
        claim_folder(tmp_path, MANIFESTS, "tiny")
    assert (tmp_path / "calibration.json").read_text() == content


def _variant(name: str, settings: dict[str, object], psnr_db: float) -> Variant:
    return Variant(
        name=name,
        settings=settings,
        evaluations=16,
        steps=16,
        psnr_db=psnr_db,
        ssim=1.0,
        image_s=1.0,
    )


def test_jobs_of_the_most_common_size_are_taken() -> None:
    rows = [*ROWS, *({**row, "id": f"{row['id']}-wide", "resolution": "16:9"} for row in ROWS[:2])]
    chosen = chosen_jobs(_jobs(rows), replace(SCALE, max_jobs=3))
    assert [job.id for job in chosen[Task.T2I]] == ["circle-red", "circle-blue", "circle-green"]


def test_jobs_that_start_from_others_are_left_out_and_tries_are_jobs() -> None:
    check = {"ask": "Is it red?", "choices": ["yes", "no"], "is": "yes", "at_least": 0.5}
    rows: list[dict[str, Any]] = [
        {**ROWS[0], "accept": check, "keep": 1, "tries": 3},
        *({"id": f"e{n}", "task": "edit", "prompt": "bluer", "image": "@a"} for n in range(2)),
        {"id": "a", "prompt": "A star"},
    ]
    chosen = chosen_jobs(_jobs(rows), SCALE)
    assert list(chosen) == [Task.T2I]
    assert len(chosen[Task.T2I]) == 4
    assert all(variant_of(job, "", {}).attempt_at is None for job in chosen[Task.T2I])


@pytest.mark.parametrize("rows", [ROWS[:1], [{"id": "a", "prompt": "a", "task": "interleave"}] * 1])
def test_too_few_jobs_are_a_mistake(rows: list[dict[str, str]]) -> None:
    with pytest.raises(ConfigError, match="at least two t2i or two edit jobs of one size"):
        chosen_jobs(_jobs(rows), SCALE)


class _Drawer:
    """Draws batches in passes of at most two jobs, without pixels."""

    largest_batch = 8
    num_following = 0
    make_room = read = replan = close = None
    velocities: ClassVar = {
        job_id: torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(number))
        for number, job_id in enumerate("abc")
    }
    """`[steps, tokens, numbers]` of each job."""

    def generate(
        self, batch: Batch, _prepared: object, *, kept: Kept, channel: Channel, **_: object
    ) -> BatchResult:
        lacking = [job for job in batch.jobs if not kept]
        for start in range(0, len(lacking), 2):
            together = lacking[start : start + 2]
            for step in range(batch.jobs[0].sampling.num_steps):
                channel.observe(step, torch.stack([self.velocities[o.id][step] for o in together]))
        results = tuple(JobResult() for _ in batch.jobs)
        return BatchResult(results=results, metrics=BatchMetrics(total_s=1.0))


def _draw(folder: Path, *ids: str, num_steps: int = 3, kept: Kept = ()) -> None:
    steps = replace(make_job("").sampling, num_steps=num_steps)
    jobs = tuple(replace(make_job(one), sampling=steps) for one in ids)
    batch = Batch(id="-".join(ids), group=group_key(jobs[0]), jobs=jobs, keys=ids)
    engine = _TracingEngine(cast(ReusableEngine, _Drawer()), folder)
    engine.generate(batch, [()] * len(jobs), kept=kept, channel=Channel())


def _own(job_id: str, num_steps: int = 3) -> np.ndarray:
    velocities = _Drawer.velocities[job_id][:num_steps].reshape(num_steps, -1).double().numpy()
    return velocities @ velocities.T / velocities.shape[1]


def test_a_record_is_of_the_jobs_that_are_asked_for_alone(tmp_path: Path) -> None:
    _draw(tmp_path, "a", "b", "c")
    for job_id in "abc":
        products = read_trace(tmp_path, (0.2, 0.6), [job_id]).products
        np.testing.assert_allclose(products, _own(job_id), rtol=1e-6)
    # As after a job was taken out of the manifest.
    mean = read_trace(tmp_path, (0.2, 0.6), ["a", "c"]).products
    np.testing.assert_allclose(mean, (_own("a") + _own("c")) / 2, rtol=1e-6)


def test_jobs_that_are_drawn_again_have_the_new_record(tmp_path: Path) -> None:
    _draw(tmp_path, "a", "b")
    _draw(tmp_path, "b", num_steps=2)
    np.testing.assert_allclose(read_trace(tmp_path, (0.5,), ["b"]).products, _own("b", 2), 1e-6)
    with pytest.raises(RunFolderError, match="a record of 2 steps of job a, found one of 3; "):
        read_trace(tmp_path, (0.5,), ["a", "b"])
    with pytest.raises(RunFolderError, match="a record of 3 steps of job c, found none; "):
        read_trace(tmp_path, (0.2, 0.6), ["a", "c"])


def test_images_that_a_killed_run_kept_are_drawn_again_for_the_record(tmp_path: Path) -> None:
    image = KeptImage(image=np.zeros((3, 32, 64), np.float32), tokens=())
    _draw(tmp_path, "a", "b", kept=((image,), ()))
    assert read_trace(tmp_path, (0.2, 0.6), ["a", "b"]).products.shape == (3, 3)


def test_products_are_formed_without_a_copy_of_all_velocities() -> None:
    generator = np.random.default_rng(0)
    velocities = [generator.normal(size=200_001).astype(np.float32) for _ in range(12)]
    tracemalloc.start()
    try:
        found = products_of(velocities)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    whole = np.stack(velocities).astype(np.float64)
    np.testing.assert_allclose(found, whole @ whole.T / 200_001, rtol=1e-9, atol=1e-12)
    assert peak < whole.nbytes / 4
