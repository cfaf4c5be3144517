"""Counts what a step would launch on a GPU. Nothing is computed."""

import math
from collections import Counter

import triton
from torch.utils._python_dispatch import TorchDispatchMode

KERNEL = type(triton.jit(len))  # the class of every kernel
PRODUCTS = {"mm", "addmm"}
NO_LAUNCH = {"empty", "empty_strided", "empty_like", "new_empty", "detach"}


class LaunchCounts(TorchDispatchMode):
    """While entered, kernels are counted and not launched; on torch's meta device its operations compute nothing.

    An operation of torch that makes no view counts as one launch.
    """

    def __init__(self, patch):
        super().__init__()
        self.kernels, self.programs, self.operations = Counter(), Counter(), Counter()
        counts = self

        def run(self, *args, grid, **options):
            name = self.fn.__name__.strip("_").removesuffix("_kernel")
            counts.kernels[name] += 1
            counts.programs[name] += math.prod(grid)

        patch.setattr(KERNEL, "run", run)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        with self:
            made = operation.decompose(*args, **kwargs or {})
        if made is not NotImplemented:
            return made
        name = operation.overloadpacket.__name__
        if not operation.is_view and name not in NO_LAUNCH:
            self.operations[name] += 1
        return operation(*args, **kwargs or {})

    @property
    def products(self):
        return sum(self.operations[name] for name in PRODUCTS)

    @property
    def launches(self):
        return self.kernels.total() + self.operations.total()
