"""Which attention is taken where, and that a backend that is named is never replaced."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.config import ModelConfig
from sensebatch.engine.device import runtime
from sensebatch.engine.device.choice import resolve_runtime
from sensebatch.engine.device.memory import cap_device_memory
from sensebatch.engine.device.runtime import (
    fastest_attention,
    resolve_attention,
    resolve_fused,
)
from sensebatch.engine.model import attention
from sensebatch.errors import ConfigError
from sensebatch.plan.attention import AttentionSpeeds
from sensebatch.plan.computation import is_tileable
from sensebatch.plan.passes import LONG_RUN
from tests.plan.loads import make_load

Installed = Callable[[list[str]], None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """Returns a function that makes modules look installed; nothing else of flash-attn is."""
    names: set[str] = set()

    def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, None) if name in names else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    attention._flash_function.cache_clear()
    yield names.update
    attention._flash_function.cache_clear()


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("capability", "modules", "expected"),
    [
        ((9, 0), [], "cudnn"),
        ((9, 0), ["flash_attn"], "cudnn"),
        ((8, 9), [], "sdpa"),
        ((8, 9), ["flash_attn"], "flash"),
    ],
)
def test_auto_takes_the_fastest_that_can_be_used(
    monkeypatch: pytest.MonkeyPatch,
    installed: Installed,
    capability: Any,
    modules: list[str],
    expected: str,
) -> None:
    installed(modules)
    on_gpu(monkeypatch, capability)
    assert resolve_attention("auto", "cuda", "bfloat16") == expected
    assert resolve_attention("auto", "cuda", "float32") == "sdpa"
    assert resolve_attention("auto", "cpu", "bfloat16") == "sdpa"


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_named_backends_never_fall_back(backend: str) -> None:
    with pytest.raises(ConfigError, match=f"expected {backend} to be usable: it needs a CUDA"):
        resolve_attention(backend, "cpu", "bfloat16")
    with pytest.raises(ConfigError, match="half precision, found cuda and float32"):
        resolve_attention(backend, "cuda", "float32")
    assert resolve_attention("sdpa", "cuda", "float32") == "sdpa"


@pytest.mark.parametrize(
    ("gpu", "modules", "dtype", "expected"),
    [
        ("NVIDIA Test", ["flash_attn"], "bfloat16", "flash"),
        # What was measured once can no longer be used, or not with these numbers.
        ("NVIDIA Test", [], "bfloat16", "sdpa"),
        ("NVIDIA Test", ["flash_attn"], "float32", "sdpa"),
        ("NVIDIA Other", ["flash_attn"], "bfloat16", "cudnn"),
    ],
)
def test_auto_takes_what_was_measured_on_this_gpu(
    monkeypatch: pytest.MonkeyPatch,
    installed: Installed,
    gpu: str,
    modules: list[str],
    dtype: str,
    expected: str,
) -> None:
    installed(modules)
    on_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    reached = {"cudnn": {4096: 1.0}, "flash": {4096: 3.0}, "sdpa": {4096: 2.0}}
    reached["of another version"] = {4096: 9.0}
    speeds = AttentionSpeeds(gpu="NVIDIA Test", torch=torch.__version__, flop_per_s=reached)
    assert fastest_attention(speeds, [make_load()], dtype) == expected
    older = replace(speeds, torch="1.0")
    assert fastest_attention(older, [make_load()], dtype) == resolve_attention(
        "auto", "cuda", dtype
    )


def test_a_missing_package_is_named(installed: Installed) -> None:
    installed([])
    with pytest.raises(ConfigError, match="flash-attn package is not installed"):
        resolve_attention("flash", "cuda", "bfloat16")


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["flash_attn", "flash_attn.cute", "flash_attn_interface"], "flash_attn_interface"),
        (["flash_attn", "flash_attn.cute"], "flash_attn.cute"),
        (["flash_attn"], "flash_attn"),
        ([], None),
    ],
)
def test_the_newest_form_of_flash_attn_is_taken(
    installed: Installed, modules: list[str], expected: str | None
) -> None:
    installed(modules)
    assert attention.flash_module() == expected


@pytest.mark.parametrize("with_sums", [True, False])
def test_flash_attention_is_asked_for_one_sequence(
    monkeypatch: pytest.MonkeyPatch, installed: Installed, with_sums: bool
) -> None:
    """Only what is called of the package is known here; the newer forms also return sums."""

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> object:
        out = torch.stack([attention.sdpa(*of_one, causal) for of_one in zip(q, k, v, strict=True)])
        return (out, torch.zeros(())) if with_sums else out

    module = ModuleType("flash_attn")
    vars(module)["flash_attn_func"] = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    installed(["flash_attn"])
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    for causal in (True, False):
        expected = attention.sdpa(q, k, v, causal)
        assert torch.equal(attention.flash(q, k, v, causal), expected)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 30), (2, 3), (8, 30), (9, 30), (29, 30), (5, 5)])
def test_queries_after_earlier_keys_need_no_mask(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, causal: bool
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(queries, 4, 8), torch.randn(keys, 2, 8), torch.randn(keys, 2, 8)
    expected = attention.sdpa(q, k, v, causal)
    masks: list[torch.Tensor | None] = []
    attend: Any = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: torch.Tensor | None, **rest: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    actual = attention.attend_without_mask(q, k, v, causal)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert set(masks) == {None}


@pytest.mark.parametrize(
    ("dtype", "capability", "masked"),
    [
        (torch.bfloat16, (9, 0), False),
        (torch.float16, (8, 0), False),
        (torch.float16, (7, 5), True),
        (torch.float32, (9, 0), True),
    ],
)
def test_without_kernels_torch_may_take_only_what_computes_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    capability: tuple[int, int],
    masked: bool,
) -> None:
    seen = []

    def watched(
        q: torch.Tensor, *_: torch.Tensor, attn_mask: torch.Tensor | None, **__: bool
    ) -> torch.Tensor:
        cuda = torch.backends.cuda
        allowed = cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()
        others = cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
        seen.append((attn_mask is not None, allowed, others))
        return q

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    q, k = torch.zeros(9, 2, 8, dtype=dtype), torch.zeros(12, 2, 8, dtype=dtype)
    attention.torch_runs(q, k, k, True)
    assert seen == [(masked, (True, True), (False, False))]


def test_long_runs_of_an_image_go_to_the_backend_and_all_others_to_another_kernel() -> None:
    taken = []

    def images(q: torch.Tensor, *_: object) -> torch.Tensor:
        taken.append("images")
        return q

    def runs(q: torch.Tensor, *_: object) -> torch.Tensor:
        taken.append("runs")
        return q

    attend = attention.shared(images, runs)
    for queries, causal in (
        (LONG_RUN, False),
        (LONG_RUN - 1, False),
        (LONG_RUN, True),
        (1, False),
    ):
        attend(torch.zeros(queries, 1, 8), torch.zeros(queries, 1, 8), torch.zeros(1), causal)
    assert taken == ["images", "runs", "runs", "runs"]


def test_a_run_never_takes_torchs_own_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one query after many keys that is a kernel whose sums depend on chance."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from sensebatch.engine.model import attention_kernels

    monkeypatch.setattr(runtime, "torch_runs", lambda q, *_: q + 1)
    monkeypatch.setattr(attention_kernels, "attend_run", lambda q, *_: q + 2)
    q = torch.zeros(1, 2, 8)
    for backend in runtime.BACKENDS:
        for fused, expected in ((False, 1), (True, 2)):
            attend = runtime.new_attention(backend, "cuda", fused=fused)
            assert torch.equal(attend(q, q, q, True), q + expected)
    assert runtime.new_attention("sdpa", "cpu", fused=False) is attention.sdpa


def test_kernels_are_for_gpus_with_triton_and_heads_of_powers_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = open_checkpoint("synthetic:8b").architecture
    tiny = open_checkpoint("tiny").architecture
    assert is_tileable(large)
    assert not is_tileable(tiny)
    spec = importlib.machinery.ModuleSpec("triton", None)
    for found in (spec, None):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, found=found: found)
        assert resolve_fused(True, "cuda", large) == (found is spec)
        assert not resolve_fused(True, "cuda", tiny)
        assert not resolve_fused(False, "cuda", large)
        assert not resolve_fused(True, "cpu", large)


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_a_budget_caps_the_device_that_is_computed_on(
    monkeypatch: pytest.MonkeyPatch, device: str, index: int
) -> None:
    capped = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    total = SimpleNamespace(total_memory=40 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: capped.append(given)
    )
    cap_device_memory(torch.device(device), 10 << 30)
    cap_device_memory(torch.device(device), 80 << 30)
    cap_device_memory(torch.device(device), None)
    cap_device_memory(torch.device("cpu"), 10 << 30)
    # Without a budget, the cap of an earlier run of the process is taken away.
    assert capped == [(0.25, index), (1.0, index), (1.0, index)]


def test_attention_that_cannot_be_used_is_known_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="attn_backend: expected cudnn to be usable"):
        resolve_runtime(ModelConfig(attn_backend="cudnn", device="cpu"))
