"""LoRA files: the namings that are read, and what is refused by name before anything is loaded."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sensebatch.checkpoint.files import open_checkpoint
from sensebatch.checkpoint.fingerprint import model_identity
from sensebatch.checkpoint.lora import read_lora
from sensebatch.checkpoint.system_prompts import resolve_system_prompts
from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.config import default_config
from sensebatch.errors import CheckpointError
from tests.checkpoint.lora_files import (
    Tensors,
    alphas,
    as_kohya,
    as_peft,
    lora_tensors,
    ranks,
    write,
    write_config,
)
from tests.golden_data import CONFIGS, golden_architecture, load_case

EXPECTED = expected_tensors(golden_architecture("dense_fm"))
PATH = "language_model.model.layers.0.self_attn.k_proj"


def golden() -> Tensors:
    return lora_tensors(load_case("common", "lora_plain"))


def scales(path: Path) -> dict[str, float]:
    return {weight: pair.scale for weight, pair in read_lora(path, EXPECTED).pairs.items()}


RANKS = ranks(golden())
RANK = RANKS[PATH]
ALPHAS = alphas(golden())


def scaled(by: Callable[[str, int], float]) -> Any:
    """Returns about the scale of each weight, computed from its path and rank."""
    return pytest.approx({f"{path}.weight": by(path, rank) for path, rank in RANKS.items()})


GOLDEN_SCALES = scaled(lambda path, rank: ALPHAS[path] / rank)


def test_a_file_of_the_release_is_identified_by_its_bytes(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", golden())
    found = read_lora(file, EXPECTED)
    assert found.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()
    # Whatever lies beside it.
    write_config(tmp_path, r=1, lora_alpha=1)
    assert read_lora(file, EXPECTED).fingerprint == found.fingerprint
    assert scales(file) == GOLDEN_SCALES


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_"])
def test_kohyas_names_are_read(tmp_path: Path, prefix: str) -> None:
    file = write(tmp_path / "lora.safetensors", as_kohya(golden(), prefix))
    assert scales(file) == GOLDEN_SCALES


@pytest.mark.parametrize("config", CONFIGS)
def test_no_two_weights_have_one_name_in_one_word(tmp_path: Path, config: str) -> None:
    expected = expected_tensors(golden_architecture(config))
    words = {name.replace(".", "_") for name in expected}
    assert len(words) == len(expected)
    matrices = {name: spec for name, spec in expected.items() if len(spec.shape) == 2}
    tensors: Tensors = {}
    for name, spec in matrices.items():
        path = name.removesuffix(".weight")
        tensors[f"{path}.lora_down.weight"] = torch.ones(1, spec.shape[1])
        tensors[f"{path}.lora_up.weight"] = torch.ones(spec.shape[0], 1)
        tensors[f"{path}.alpha"] = torch.tensor(2.0)
    file = write(tmp_path / "lora.safetensors", as_kohya(tensors))
    assert read_lora(file, expected).pairs.keys() == matrices.keys()


@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", "diffusion_model.", ""])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_an_adapter_has_its_alpha_in_its_configuration(
    tmp_path: Path, prefix: str, name: str
) -> None:
    file = write(tmp_path / name, as_peft(golden(), prefix))
    write_config(
        tmp_path,
        peft_type="LORA",
        r=1,
        rank_pattern=RANKS,
        lora_alpha=6,
        target_modules=["k_proj"],
    )
    for path in (tmp_path, file):
        assert scales(path) == scaled(lambda _, rank: 6 / rank)


def test_alphas_and_ranks_of_single_modules_are_honoured(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", as_peft(golden()))
    first, second = RANKS
    write_config(
        tmp_path,
        r=RANKS[first],
        lora_alpha=6,
        rank_pattern={second.split(".", 2)[2]: RANKS[second]},
        alpha_pattern={second.split(".", 1)[1]: 3.0},
    )
    assert scales(tmp_path) == scaled(lambda path, rank: (6 if path == first else 3) / rank)
    write_config(tmp_path, r=1, rank_pattern=RANKS, lora_alpha=6, use_rslora=True)
    assert scales(tmp_path) == scaled(lambda _, rank: 6 / rank**0.5)


def test_a_name_is_not_the_end_of_another_one(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", as_peft(golden()))
    patterns = {"proj": 3.0, "attn.k_proj": 3.0, "_proj_mot_gen": 3.0}
    write_config(tmp_path, r=1, rank_pattern=RANKS, lora_alpha=6, alpha_pattern=patterns)
    assert scales(tmp_path) == scaled(lambda _, rank: 6 / rank)


def test_an_adapter_is_identified_by_its_weights_and_what_scales_them(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", as_peft(golden()))
    found = []
    for fields in (
        {"lora_alpha": 6},
        {"lora_alpha": 7},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 6, "alpha_pattern": {"k_proj": 2}},
        {"lora_alpha": 6, "base_model_name_or_path": "somewhere"},
    ):
        write_config(tmp_path, r=1, rank_pattern=RANKS, **fields)
        found.append(read_lora(tmp_path, EXPECTED).fingerprint)
    assert len(set(found[:4])) == 4
    assert found[4] == found[0]


def test_a_file_of_diffusers_may_have_alphas_of_its_own(tmp_path: Path) -> None:
    tensors = as_peft(golden(), "transformer.")
    for path, alpha in alphas(golden()).items():
        tensors[f"transformer.{path}.alpha"] = torch.tensor(alpha)
    assert scales(write(tmp_path / "a.safetensors", tensors)) == GOLDEN_SCALES


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]
)
def test_alphas_of_every_dtype_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = golden() | {f"{PATH}.alpha": torch.tensor([3], dtype=dtype)}
    file = write(tmp_path / "lora.safetensors", tensors)
    assert scales(file)[f"{PATH}.weight"] == 3 / RANK


def test_mixed_prefixes_are_refused(tmp_path: Path) -> None:
    tensors = lora_tensors(load_case("common", "lora_mixed_prefix"))
    file = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"expected diffusion_model\. before all keys or"):
        read_lora(file, EXPECTED)


def without(key: str) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        del tensors[key]

    return spoil


def with_one(key: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        tensors[key] = value

    return spoil


def not_finite(number: float, dtype: torch.dtype) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        up = tensors[f"{PATH}.lora_up.weight"].to(dtype)
        up.view(-1)[-1] = number
        tensors[f"{PATH}.lora_up.weight"] = up

    return spoil


def no_matrix(tensors: Tensors) -> None:
    for role in ("lora_up", "lora_down"):
        tensors[f"language_model.model.norm.{role}.weight"] = torch.zeros(64, 1)
    tensors["language_model.model.norm.alpha"] = torch.ones(1)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (without(f"{PATH}.alpha"), r"k_proj\.alpha: expected, not found"),
        (without(f"{PATH}.lora_up.weight"), r"k_proj\.lora_up\.weight: expected, not found"),
        (
            with_one("language_model.model.layers.9.self_attn.k_proj.alpha", torch.ones(())),
            r"as of the release: 1 keys fit no weight.*layers\.9\.self_attn\.k_proj\.alpha",
        ),
        (
            with_one(f"{PATH}.lora_up.weight", torch.zeros(64, 5)),
            r"k_proj: expected lora_up \[64, rank\].*found \[64, 5\] and \[4, 64\]",
        ),
        (no_matrix, r"model\.norm: expected lora_up"),
        (with_one(f"{PATH}.alpha", torch.tensor(float("inf"))), "alpha: expected one finite"),
        (with_one(f"{PATH}.alpha", torch.ones(2)), r"alpha: expected one finite number.*\[2\]"),
        (
            with_one(f"{PATH}.lora_up.weight", torch.zeros(64, 4, dtype=torch.int8)),
            r"k_proj\.lora_up\.weight: expected F64 or F32 or F16 or BF16, found I8",
        ),
        *(
            (not_finite(number, dtype), r"k_proj\.lora_up\.weight: expected finite numbers")
            for number in (float("nan"), float("inf"), float("-inf"))
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        ),
        (dict.clear, "found no tensors"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[Tensors], None], complaint: str
) -> None:
    tensors = golden()
    spoil(tensors)
    with pytest.raises(CheckpointError, match=complaint):
        read_lora(write(tmp_path / "lora.safetensors", tensors), EXPECTED)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"{PATH}.dora_scale", "DoRA"),
        (f"base_model.model.{PATH}.lora_magnitude_vector.weight", "DoRA"),
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.lora_mid.weight", "LoCon"),
        ("unet.x.processor.to_q_lora.down.weight", "old attention processors"),
        (f"{PATH}.diff", "difference of whole weights"),
        ("base_model.model.x.ia3_l", "IA3"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_their_names(
    tmp_path: Path, key: str, kind: str
) -> None:
    file = write(tmp_path / "lora.safetensors", golden() | {key: torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=f"expected a LoRA of two matrices.*{kind}.*"):
        read_lora(file, EXPECTED)


def test_a_path_that_begins_with_diffusion_is_no_difference(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in golden().items()}
    with pytest.raises(CheckpointError, match="6 keys fit no weight"):
        read_lora(write(tmp_path / "lora.safetensors", tensors), EXPECTED)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"lora_alpha": None}, "lora_alpha: expected a number, found None"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a number|expected JSON"),
        ({"r": 2, "rank_pattern": None}, f"expected rank {RANK} for {PATH}.*found 2"),
        ({"r": True}, "r: expected a whole number, found True"),
        ({"rank_pattern": {"k_proj": 3}}, f"expected rank {RANK} for {PATH}.*found 3"),
        ({"rank_pattern": {"k_proj|.*": 4}}, "rank_pattern: expected names of modules"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "alpha_pattern: expected names of modules"),
        ({"alpha_pattern": {"k_proj": "4"}}, r"alpha_pattern\.k_proj: expected a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected a map"),
        ({"peft_type": "LOHA"}, 'peft_type: expected "LORA", found .LOHA.'),
        ({"use_dora": True}, "use_dora: expected false, found True"),
        ({"bias": "all"}, 'bias: expected "none", found .all.'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: expected false"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: .pissa_niter_4. belongs to"),
    ],
)
def test_a_configuration_that_asks_for_more_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], complaint: str
) -> None:
    write(tmp_path / "adapter_model.safetensors", as_peft(golden()))
    write_config(tmp_path, **{"r": 1, "rank_pattern": RANKS, "lora_alpha": 6} | fields)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        read_lora(tmp_path, EXPECTED)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize("form", [dict, as_kohya])
def test_file_without_any_alpha_counts_as_it_is(
    tmp_path: Path, form: Callable[[Tensors], Tensors]
) -> None:
    tensors = {name: values for name, values in golden().items() if not name.endswith(".alpha")}
    file = write(tmp_path / "lora.safetensors", form(tensors))
    assert set(scales(file).values()) == {1}
    assert not read_lora(file, EXPECTED).has_alphas
    # A single one that is missing is a damage; see above.
    assert read_lora(write(file, form(golden())), EXPECTED).has_alphas


def test_run_with_a_file_without_alphas_is_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint("tiny")
    name = "language_model.model.layers.0.self_attn.q_proj_mot_gen"
    rows, columns = expected_tensors(checkpoint.architecture)[f"{name}.weight"].shape
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, columns),
        f"{name}.lora_up.weight": torch.ones(rows, 2),
    }
    prompts = resolve_system_prompts(checkpoint, None)

    def warnings(**alpha: torch.Tensor) -> list[str]:
        file = write(tmp_path / "lora.safetensors", tensors | alpha)
        model = replace(default_config("tiny").model, lora_path=str(file))
        caplog.clear()
        assert model_identity(checkpoint, prompts, model, dtype="float32").lora is not None
        return [record.getMessage() for record in caplog.records]

    (warning,) = warnings()
    assert "lora.safetensors: has no alphas, so the products of its matrices count" in warning
    assert warnings(**{f"{name}.alpha": torch.tensor(2.0)}) == []


def test_an_adapter_without_configuration_has_no_alpha(tmp_path: Path) -> None:
    file = write(tmp_path / "adapter_model.safetensors", as_peft(golden()))
    message = r"k_proj\.alpha: expected, not found \(or adapter_config\.json beside it\)"
    with pytest.raises(CheckpointError, match=message):
        read_lora(file, EXPECTED)


def test_a_folder_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected adapter_model\.safetensors or"):
        read_lora(tmp_path, EXPECTED)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: save it as safetensors"):
        read_lora(tmp_path, EXPECTED)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    with pytest.raises(CheckpointError, match="expected a readable file"):
        read_lora(file, EXPECTED)
    file.write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        read_lora(file, EXPECTED)


def test_matrices_in_pieces_are_searched_to_their_last_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensebatch.checkpoint.lora.PIECE_BYTES", 64)
    tensors = golden()
    file = write(tmp_path / "lora.safetensors", tensors)
    assert scales(file) == GOLDEN_SCALES
    tensors[f"{PATH}.lora_down.weight"][-1, -1] = float("nan")
    with pytest.raises(CheckpointError, match=r"k_proj\.lora_down\.weight: expected finite"):
        read_lora(write(file, tensors), EXPECTED)


def test_the_embedded_checkpoint_takes_an_adapter(tmp_path: Path) -> None:
    expected = expected_tensors(open_checkpoint("tiny").architecture)
    name = "language_model.model.layers.0.self_attn.q_proj_mot_gen"
    rows, columns = expected[f"{name}.weight"].shape
    tensors = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(2, columns),
        f"base_model.model.{name}.lora_B.weight": torch.ones(rows, 2),
    }
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", tensors)
    write_config(folder, r=2, lora_alpha=8, peft_type="LORA")
    assert read_lora(folder, expected).pairs[f"{name}.weight"].scale == 4
    shutil.copy(folder / "adapter_model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match="alpha: expected, not found"):
        read_lora(tmp_path / "alone.safetensors", expected)
