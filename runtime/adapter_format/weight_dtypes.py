"""Maps the dtypes of an adapter's weights, as a safetensors file names them, to numpy's.

numpy has no bfloat16, so an array of uint16 holds its bits. All data is little endian.
"""

import numpy as np

HELD: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
NAMES: dict[np.dtype, str] = {held: name for name, held in HELD.items()}
INFINITY_BITS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}

_SIGNED: dict[int, np.dtype] = {2: np.dtype("<i2"), 4: np.dtype("<i4")}
_UNSIGNED: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values as float32, exactly. F32 values are returned as they are, others as a copy in row order."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype("<f4", order="C")
    bits = values.astype("<u4", order="C")
    bits <<= 16
    return bits.view("<f4")


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 values as `dtype` holds them, each rounded to the nearest, ties to even."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):  # to infinity, as PyTorch does
            return values.astype("<f2")
    bits = np.ascontiguousarray(values).view("<u4")
    upper: np.ndarray = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return upper


def largest_magnitude(data: memoryview, dtype: str) -> int:
    """Return the bits, without the sign, of the value with the largest magnitude.

    They are at least INFINITY_BITS if any value is not finite. Magnitudes have the order of their bits; read as signed
    integers, positive values are the largest, and read as unsigned ones, negative values are.
    """
    size = HELD[dtype].itemsize
    bits = np.frombuffer(data, _UNSIGNED[size])
    return max(int(bits.view(_SIGNED[size]).max()), int(bits.max()) & ((1 << 8 * size - 1) - 1))


def value_of(bits: int, dtype: str) -> float:
    """Return the value that has these bits."""
    held = HELD[dtype]
    return float(widened(np.array([bits], _UNSIGNED[held.itemsize]).view(held), dtype)[0])
