"""The published summary: each call counted once, however many rows it has."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.errors import RunFolderError
from sensebatch.report.summary import format_summary, read_log, summarise, summary_json
from sensebatch.units import GIB
from tests.log_rows import log_row, log_table

TWO_CALLS = (
    log_row("a", "x"),
    log_row("b", "x"),
    log_row(
        "c", "y", task="interleave", num_images=3, image_tokens=192, total_s=8.0, text_tokens=20
    ),
)


def test_what_functions_did_beside_the_drawing_is_no_generation() -> None:
    beside = log_row("q", "z", task="ask", function="m:f", num_images=0, status="failed")
    found, alone = summarise(log_table(*TWO_CALLS, beside)), summarise(log_table(*TWO_CALLS))
    assert (found.total, found.calls, found.workers) == (alone.total, alone.calls, alone.workers)
    assert found.failed_attempts == alone.failed_attempts + 1


def test_batch_seconds_are_counted_once_for_all_its_jobs() -> None:
    total = summarise(log_table(*TWO_CALLS)).total
    assert (total.calls, total.jobs, total.images, total.wall_s) == (2, 3, 5, 12.0)
    assert total.seconds_per_image == pytest.approx(12 / 5)
    assert total.image_tok_per_s == pytest.approx((64 + 64 + 192) / 12)
    assert total.text_tokens == 20


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_totals_do_not_depend_on_how_jobs_are_batched(sizes: list[int]) -> None:
    rows = [
        log_row(f"{batch}-{job}", str(batch), total_s=float(size))
        for batch, size in enumerate(sizes)
        for job in range(size)
    ]
    total = summarise(log_table(*rows)).total
    assert total.calls == len(sizes)
    assert total.images == sum(sizes)
    assert total.seconds_per_image == pytest.approx(1.0)


def test_failed_attempts_are_counted_apart() -> None:
    failed = log_row("d", "x", status="failed", num_images=0, image_tokens=0)
    summary = summarise(log_table(*TWO_CALLS, failed))
    assert summary.failed_attempts == 1
    assert summary.total == summarise(log_table(*TWO_CALLS)).total


def test_each_session_loads_once_and_can_be_looked_at_alone() -> None:
    log = log_table(*TWO_CALLS, log_row("d", "x", session=2, load_s=5.0))
    assert summarise(log).load_s == pytest.approx(8.0)
    assert summarise(log).sessions == 2
    assert summarise(log).total.calls == 3
    alone = summarise(log, session=2)
    assert (alone.load_s, alone.total.calls) == (5.0, 1)


def test_peaks_are_the_highest_of_all_calls() -> None:
    higher = log_row("d", "z", peak_allocated_bytes=9 * GIB, peak_rss_bytes=2 * GIB)
    peak = summarise(log_table(*TWO_CALLS, higher)).peak
    assert (peak.allocated_bytes, peak.reserved_bytes) == (9 * GIB, 6 * GIB)
    assert peak.rss_bytes == 2 * GIB


def test_precision_is_said_where_it_is_not_the_dtype() -> None:
    plain = format_summary(summarise(log_table(*TWO_CALLS))).splitlines()
    fp8 = log_row("d", "z", precision="fp8")
    assert format_summary(summarise(log_table(fp8))).splitlines()[0] == plain[0] + "  precision=fp8"
    unquantised = log_row("e", "y", precision=None)
    both = format_summary(summarise(log_table(fp8, unquantised))).splitlines()[0]
    assert both == plain[0] + "  precision=bfloat16, fp8"
    assert summarise(log_table(unquantised)).precision == "-"


def test_fields_are_in_the_published_order() -> None:
    lines = format_summary(summarise(log_table(*TWO_CALLS))).splitlines()
    assert [line[:15].strip() for line in lines[:9]] == [
        "config",
        "model load",
        "load peak",
        "generations",
        "average",
        "image tokens",
        "throughput",
        "generation peak",
        "waiting",
    ]
    assert lines[0].split("  ", 1)[1].split() == [
        "vram_mode=full",
        "attn_backend=sdpa",
        "dtype=bfloat16",
    ]
    assert lines[2].endswith("allocated=2.00 GiB  reserved=3.00 GiB  rss=1.00 GiB")
    assert [line.strip().startswith("call ") for line in lines[9:]] == [True, True]
    assert "call 2: interleave 256x256  jobs=1  images=3  8.000 s" in lines[10]


def test_memory_of_a_device_is_left_out_where_there_was_none() -> None:
    zeros = {
        f"{when}peak_{what}_bytes": 0
        for when in ("", "load_")
        for what in ("allocated", "reserved")
    }
    lines = format_summary(summarise(log_table(log_row("a", "x", **zeros)))).splitlines()
    assert lines[2] == "load peak       rss=1.00 GiB"
    assert "reserved" not in "\n".join(lines)
    assert lines[-1].endswith(" tok/s  rss=1.00 GiB")


def test_calls_are_listed_in_the_order_of_the_log() -> None:
    # Names that do not sort, and enough of them that a hash table gives them in another order.
    names = [f"{number * 7919 % 1000:016x}" for number in range(200)]
    tasks = ["interleave", "edit"]
    log = log_table(
        *(
            log_row(f"{name}-{job}", name, task=tasks[number // 100])
            for number, name in enumerate(names)
            for job in range(1 + number % 3)
        )
    )
    assert [call.batch_id for call in summarise(log).calls] == names
    assert list(summarise(log).by_group) == ["interleave 256x256", "edit 256x256"]
    lines = format_summary(summarise(log)).splitlines()[-200:]
    assert ["edit" in line for line in lines] == [False] * 100 + [True] * 100


def test_groups_are_by_task_and_size() -> None:
    groups = summarise(log_table(*TWO_CALLS)).by_group
    assert list(groups) == ["t2i 256x256", "interleave 256x256"]
    assert (groups["t2i 256x256"].jobs, groups["interleave 256x256"].text_tokens) == (2, 20)


def test_jobs_that_think_are_a_group_of_their_own() -> None:
    plain = log_row(job_id="a", batch_id="x")
    thinking = log_row(job_id="b", batch_id="y", think=True, think_tokens=70)
    groups = summarise(log_table(plain, thinking)).by_group
    assert {name: group.jobs for name, group in groups.items()} == {
        "t2i 256x256": 1,
        "t2i 256x256 with thinking": 1,
    }
    assert [group.text_tokens for group in groups.values()] == [0, 70]


def test_log_without_rows_is_an_empty_summary() -> None:
    summary = summarise(log_table())
    assert summary.total.seconds_per_image is None
    assert "average         - s/image" in format_summary(summary)
    assert summary_json(summary)["calls"] == ()


def test_log_is_read_from_the_columns_it_has(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(log_table(*TWO_CALLS), path)
    assert summarise(read_log(path)) == summarise(log_table(*TWO_CALLS))


def test_calls_with_kept_images_are_counted_but_no_speed_is_measured_by_them() -> None:
    kept = [log_row(f"k{i}", "k", total_s=1.0, num_kept_images=2) for i in range(3)]
    plain, total = summarise(log_table(*TWO_CALLS)), summarise(log_table(*TWO_CALLS, *kept)).total
    assert (total.calls, total.images, total.wall_s) == (3, 8, 13.0)
    assert (total.kept_images, total.calls_with_kept) == (2, 1)
    assert total.seconds_per_image == plain.total.seconds_per_image
    assert total.image_tok_per_s == plain.total.image_tok_per_s
    text = format_summary(summarise(log_table(*TWO_CALLS, *kept)))
    assert "kept images     2 in 1 call, drawn earlier" in text
    assert "jobs=3  images=3 (2 kept)  1.000 s  0.500 s/step  - tok/s" in text
    assert "kept" not in format_summary(plain)
    alone = summarise(log_table(*kept))
    assert (alone.total.seconds_per_image, alone.total.image_tok_per_s) == (None, None)
    assert alone.by_group["t2i 256x256"].image_tok_per_s is None


def test_a_log_that_does_not_say_what_was_kept_has_nothing_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(log_table(*TWO_CALLS).drop_columns(["num_kept_images"]), path)
    assert summarise(read_log(path)) == summarise(log_table(*TWO_CALLS))


@pytest.mark.parametrize("content", [None, b"", b"no parquet"])
def test_what_is_not_a_log_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "log.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        RunFolderError, match=r"expected the log of a run(: .*[^.]; the next|, found)"
    ):
        read_log(path)


def test_batches_of_identical_jobs_are_calls_of_their_own() -> None:
    later = datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
    log = log_table(log_row("a", "x"), log_row("b", "x"), log_row("c", "x", started_at=later))
    total = summarise(log).total
    assert (total.calls, total.jobs, total.wall_s) == (2, 3, 8.0)


def test_questions_draw_nothing_and_so_have_no_speed_of_images() -> None:
    row = log_row("a", "b", task="ask", num_images=0, image_tokens=0, width=None, height=None)
    summary = summarise(log_table(row))
    assert summary.total.image_tok_per_s is None
    assert summary.total.seconds_per_image is None
    assert "0.00 tok/s" not in format_summary(summary)


def test_truncated_texts_are_counted_by_their_reason() -> None:
    rows = [log_row("a", "x", finish_reason="complete"), log_row("b", "x", finish_reason=None)]
    whole = summarise(log_table(*rows))
    assert whole.finish_reasons == {"complete": 1}
    assert "finish reasons" not in format_summary(whole)
    rows += [log_row(name, "x", finish_reason="token_limit") for name in "cd"]
    rows.append(log_row("e", "x", finish_reason="token_limit", status="failed"))
    cut = summarise(log_table(*rows))
    assert cut.finish_reasons == {"complete": 1, "token_limit": 2}
    assert "finish reasons  complete=1  token_limit=2\n" in f"{format_summary(cut)}\n"
