"""The dtypes of an adapter's weights, by their names in a safetensors file, as numpy holds them.

It has no bfloat16, which is held as its bits. All data is little endian.
"""

import numpy as np

HELD: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
NAMES: dict[np.dtype, str] = {held: name for name, held in HELD.items()}
INFINITY_BITS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}

_SIGNED: dict[int, np.dtype] = {2: np.dtype("<i2"), 4: np.dtype("<i4")}
_UNSIGNED: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as float32, which holds every value of each dtype exactly; in row order, unless they are that already."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype("<f4", order="C")
    bits = values.astype("<u4", order="C")
    bits <<= 16
    return bits.view("<f4")


def largest_magnitude(data: memoryview, dtype: str) -> int:
    """The bits of the largest magnitude among values, their sign aside; not less than infinity's unless all are finite.

    Magnitudes are ordered like their bits: as signed integers the positive values are over the negative ones, as
    unsigned ones below them.
    """
    size = HELD[dtype].itemsize
    bits = np.frombuffer(data, _UNSIGNED[size])
    return max(int(bits.view(_SIGNED[size]).max()), int(bits.max()) & ((1 << 8 * size - 1) - 1))


def value_of(bits: int, dtype: str) -> float:
    held = HELD[dtype]
    return float(widened(np.array([bits], _UNSIGNED[held.itemsize]).view(held), dtype)[0])
