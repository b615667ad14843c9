"""Times how fast a checkpoint's files come to where a run needs them.

    python -m sensebatch.engine.bench_loading /data/8b --model synthetic:8b

A developer's tool. Writes files of full size where the folder has none, reads them once so that
they are in the system's page cache, and loads them as runs do. Prints a Markdown table.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from sensebatch.checkpoint.files import INDEX_SUFFIX, Checkpoint, open_checkpoint, read_folder
from sensebatch.checkpoint.tokenizer import TOKENIZER_FILES
from sensebatch.config import default_config
from sensebatch.engine.device.memory import empty_cache
from sensebatch.engine.weights.loader import NetworkLoader, open_weights, wide_tensors
from sensebatch.engine.weights.sources import SyntheticWeights
from sensebatch.engine.weights.tensor_files import FILE_DTYPES
from sensebatch.jobs import VramMode
from sensebatch.plan.device import place
from sensebatch.plan.host import ENOUGH_BYTES
from sensebatch.units import GIB

SHARD_BYTES = 4 * GIB
READ_BYTES = 1 << 24


def write_files(checkpoint: Checkpoint, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a checkpoint with synthetic weights as files, in shards and with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    source = SyntheticWeights(torch.bfloat16, wide=wide_tensors(checkpoint))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_shards(checkpoint, shard_bytes)):
        tensors = {}
        for name in names:
            tensor = checkpoint.tensors[name]
            tensors[name] = torch.empty(tensor.shape, dtype=FILE_DTYPES[tensor.dtype])
            source.read_into(name, None, tensors[name])
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / f"model{INDEX_SUFFIX}").write_text(json.dumps({"weight_map": weight_map}))
    for name in TOKENIZER_FILES:
        if (checkpoint.path / name).exists():
            shutil.copy(checkpoint.path / name, folder)
    # The last one, so that a folder that has it is whole.
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config)))


def _shards(checkpoint: Checkpoint, shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    num_bytes = 0
    for name, tensor in checkpoint.tensors.items():
        if names and num_bytes + tensor.nbytes > shard_bytes:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += tensor.nbytes
    yield names


def read_files(checkpoint: Checkpoint) -> int:
    """Reads all files of a checkpoint into the page cache; returns the bytes of its tensors."""
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        with file.open("rb", buffering=0) as stream:
            while stream.read(READ_BYTES):
                pass
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def load_seconds(checkpoint: Checkpoint, mode: VramMode, device: torch.device) -> float:
    """Returns the seconds until all weights are where a memory mode keeps them."""
    dtype = torch.bfloat16
    loader = NetworkLoader(
        arch=checkpoint.architecture,
        source=open_weights(checkpoint, None, dtype),
        device=device,
        dtype=dtype,
    )
    memory = replace(default_config(checkpoint.name).memory, vram_mode=mode)
    placements = place(
        loader.computation, memory=memory, loads=[], device_free=None, host_free=ENOUGH_BYTES
    )
    start = time.perf_counter()
    loaded = loader.load(placements.leanest)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    del loaded
    empty_cache(device)
    return seconds


def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder; written where it is missing.")],
    model: Annotated[str, typer.Option(help="What is written there.")] = "synthetic:8b",
) -> None:
    """Prints how fast a checkpoint loads from the page cache."""
    if not (folder / "config.json").exists():
        write_files(open_checkpoint(model), folder)
    checkpoint = read_folder(folder)
    num_bytes = read_files(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| mode | seconds | GiB/s |\n| --- | ---: | ---: |")
    for mode in (VramMode.FULL, VramMode.BALANCED):
        seconds = load_seconds(checkpoint, mode, device)
        print(f"| {mode} | {seconds:.2f} | {num_bytes / GIB / seconds:.2f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
