"""What Python and C++ each say of the same memory."""

import numpy as np

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.library import load


def test_constants_and_the_sizes_of_structures_are_the_headers(library: None) -> None:
    wanted = structs.shared()
    found = np.zeros(64, np.int64)
    load().shared(found.ctypes.data)
    assert np.trim_zeros(found, "b").tolist() == wanted
