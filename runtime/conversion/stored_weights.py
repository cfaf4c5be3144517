"""The weights of an adapter, in whichever form a training program left them."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from runtime.adapter_format.errors import CONVERT, InvalidAdapter
from runtime.adapter_format.safetensors_header import foreign_format, read_header
from runtime.adapter_format.weight_dtypes import HELD

WHOLE, SHARDS = "adapter_model.safetensors", "adapter_model-*-of-*.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
MLX = "adapters.safetensors"
NOT_PLAIN = (
    "cannot be read as tensors alone (weights_only) in bounded memory and time; "
    "save it with save_pretrained(..., safe_serialization=True)"
)


class StoredWeights(NamedTuple):
    """Tensors by the names that their author gave them; uint16 holds the bits of bfloat16."""

    tensors: dict[str, np.ndarray]
    said: str  # where they come from
    is_mlx: bool = False


def stored_weights(source: Path) -> StoredWeights:
    """Read the weights in a directory. Raises InvalidAdapter, by the name of the file; OSError."""
    if (source / WHOLE).exists():
        return StoredWeights(_tensors(source / WHOLE), f"read {WHOLE}")
    if shards := sorted(source.glob(SHARDS)):
        return _joined(shards)
    for name in PICKLES:
        if (source / name).exists():
            return StoredWeights(_unpickled(source / name), f"read the pickle {name}, with weights_only")
    if (source / MLX).exists():
        return StoredWeights(_tensors(source / MLX), f"read {MLX} of mlx-lm", is_mlx=True)
    known = ", ".join((WHOLE, SHARDS, PICKLES[0], MLX))
    raise InvalidAdapter("weights", f"are not in {source}", f"give a directory that has {known}")


def _tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            header = read_header(file)
            data = np.memmap(file, np.uint8, "r", offset=header.data_offset)
    except InvalidAdapter as error:
        raise InvalidAdapter(path.name, str(error).removesuffix(f"; {error.step}"), error.step) from None
    return {
        name: data[entry.start : entry.stop].view(HELD[entry.dtype]).reshape(entry.shape)
        for name, entry in header.tensors.items()
    }


def _joined(shards: list[Path]) -> StoredWeights:
    expected = int(shards[0].stem.rpartition("-")[2])
    if len(shards) != expected:
        raise InvalidAdapter(SHARDS, f"are {len(shards)} files, their names say {expected}", "fetch all of them")
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        found = _tensors(shard)
        if twice := tensors.keys() & found.keys():
            raise InvalidAdapter(shard.name, f"has {min(twice)}, which another shard has too")
        tensors |= found
    return StoredWeights(tensors, f"joined {len(shards)} shards")


def _unpickled(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        start = file.read(512)
    foreign = foreign_format(start)
    if foreign is not None and foreign[1] != CONVERT:
        raise InvalidAdapter(path.name, *foreign)
    with TemporaryDirectory() as directory:
        target = Path(directory) / WHOLE
        done = subprocess.run(
            [sys.executable, "-m", "runtime.conversion.pickle_process", str(path), str(target)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        if done.returncode:
            what, _, step = (done.stdout.strip() or NOT_PLAIN).partition("; ")
            raise InvalidAdapter(path.name, what, step)
        return {name: np.array(tensor) for name, tensor in _tensors(target).items()}
