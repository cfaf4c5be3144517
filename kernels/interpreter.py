"""Whether kernels run in Triton's interpreter."""

import triton


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels when they were imported: then they take tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)
