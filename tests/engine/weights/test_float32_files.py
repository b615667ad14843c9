"""Files that hold the generation expert in float32, as U1.5's do, load as if it were bfloat16."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensebatch.checkpoint.files import (
    INDEX_SUFFIX,
    TINY_FOLDER,
    Checkpoint,
    open_checkpoint,
    read_folder,
)
from sensebatch.checkpoint.tensors import TensorGroup, expected_tensors
from sensebatch.config import default_config
from sensebatch.engine.weights.loader import NetworkLoader, open_weights
from sensebatch.jobs import VramMode
from sensebatch.plan.device import place
from sensebatch.plan.host import ENOUGH_BYTES
from sensebatch.plan.placement import Placement

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The embedded checkpoint in two files with an index, its generation expert in float32."""
    folder = tmp_path_factory.mktemp("wide")
    specs = expected_tensors(open_checkpoint("tiny").architecture)
    (file,) = TINY_FOLDER.glob("*.safetensors")
    tensors = {
        name: tensor.float() if specs[name].group is TensorGroup.GENERATION else tensor
        for name, tensor in load_file(file).items()
    }
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == part}, folder / part)
    (folder / f"model{INDEX_SUFFIX}").write_text(json.dumps({"weight_map": weight_map}))
    for other in TINY_FOLDER.iterdir():
        if other.suffix != ".safetensors":
            (folder / other.name).write_bytes(other.read_bytes())
    return read_folder(folder)


def loader_of(checkpoint: Checkpoint, dtype: torch.dtype) -> NetworkLoader:
    return NetworkLoader(
        arch=checkpoint.architecture,
        source=open_weights(checkpoint, None, dtype),
        device=torch.device("cpu"),
        dtype=dtype,
    )


def placement_of(loader: NetworkLoader, mode: VramMode) -> Placement:
    memory = replace(default_config("tiny").memory, vram_mode=mode)
    return place(
        loader.computation, memory=memory, loads=[], device_free=None, host_free=ENOUGH_BYTES
    ).leanest


def generation_weights(
    loader: NetworkLoader, placement: Placement
) -> tuple[dict[str, torch.Tensor], int]:
    """Returns what the generation expert computes with, as it is lent, and the host's bytes."""
    network, residency = loader.load(placement)
    residency.denoise()
    found = {}
    for index in range(loader.arch.num_layers):
        with network.generation.lend(index) as layer:
            for name, parameter in layer.named_parameters():
                found[f"{index}.{name}"] = parameter.clone()
    found |= {name: value.clone() for name, value in network.head.named_parameters()}
    return found, residency.host_bytes


@pytest.mark.parametrize("mode", [VramMode.FULL, VramMode.FAST, VramMode.BALANCED])
@pytest.mark.parametrize("host_block_bytes", [None, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_they_load_as_bfloat16_does(
    wide: Checkpoint, mode: VramMode, host_block_bytes: int | None, dtype: torch.dtype
) -> None:
    """Also where layers are read from the files each time."""
    found = []
    for checkpoint in (wide, open_checkpoint("tiny")):
        loader = loader_of(checkpoint, dtype)
        placement = placement_of(loader, mode)
        if placement.num_buffers is not None:
            placement = replace(placement, host_block_bytes=host_block_bytes)
        found.append(generation_weights(loader, placement))
    (weights, host_bytes), (expected, expected_bytes) = found
    assert host_bytes == expected_bytes
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, expected[name]), name


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from sensebatch.checkpoint import files
from sensebatch.checkpoint.architecture import parse_architecture
from sensebatch.checkpoint.tensors import expected_tensors
from sensebatch.config import default_config
from sensebatch.engine import bench_loading
from sensebatch.engine.weights.loader import NetworkLoader, open_weights
from sensebatch.plan.device import place
from sensebatch.plan.host import ENOUGH_BYTES
from sensebatch.process import peak_rss_bytes

folder, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "write":
    whole = files.open_checkpoint("synthetic:u1.5")
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4,
             "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 2000}
    config = {**whole.config, "llm_config": {**whole.config["llm_config"], **sizes}}
    arch = parse_architecture(config)
    tensors = {
        name: replace(whole.tensors[name], shape=spec.shape,
                      nbytes=files.DTYPE_BYTES[whole.tensors[name].dtype] * spec.num_elements)
        for name, spec in expected_tensors(arch).items()
    }
    small = replace(whole, config=config, architecture=arch, tensors=tensors)
    bench_loading.write_files(small, folder, shard_bytes=100 << 20)
    raise SystemExit
checkpoint = files.read_folder(folder)
loader = NetworkLoader(
    arch=checkpoint.architecture,
    source=open_weights(checkpoint, None, torch.bfloat16),
    device=torch.device("cpu"),
    dtype=torch.bfloat16,
)
memory = replace(default_config("tiny").memory, vram_mode=mode)
placement = place(
    loader.computation, memory=memory, loads=[], device_free=None, host_free=ENOUGH_BYTES
).leanest
# Imports what a load imports.
loader.new_network()
before = peak_rss_bytes()
loaded = loader.load(placement)
stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
rounded = sum(2 * spec.num_elements for spec in expected_tensors(checkpoint.architecture).values())
print(stored, rounded, peak_rss_bytes() - before)
"""


def run_script(folder: Path, mode: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), mode],
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="needs the resident memory of a process")
def test_a_load_never_holds_a_weight_twice(tmp_path: Path) -> None:
    run_script(tmp_path, "write")
    stored, rounded, taken = run_script(tmp_path, "balanced")
    assert stored > 1.4 * rounded
    assert taken <= 1.1 * rounded
