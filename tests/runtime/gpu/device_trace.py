"""A device without numbers, which refuses every operation that would make the host wait for a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
COPY, MOVE = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class DeviceTrace(TorchDispatchMode):
    """Counts uploads to torch's meta device while entered, and raises on operations that would wait for a GPU.

    That device's tensors have shapes and no numbers, so torch itself refuses to read one and to make shapes of them.
    Refused here: a mask as an index; an operation on tensors of both sides; an upload that is blocking or from memory
    that is not page-locked; and a tensor of the device that torch copied there where no operation shows, as it does
    for `torch.tensor`. `inputs` are on the device from the beginning; kernels are to be replaced by `launch`.
    """

    def __init__(self, *inputs):
        super().__init__()
        self.uploads = self.launches = 0
        self._known = {id(tensor): tensor for tensor in inputs}
        self._page_locked = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        with self:
            made = operation.decompose(*args, **kwargs or {})
        if made is not NotImplemented:
            return made
        kwargs = dict(kwargs or {})
        locks = kwargs.pop("pin_memory", False)  # nothing can be, without a GPU
        self._check(operation, args, kwargs)
        made = operation(*args, **kwargs)
        for tensor in self._tensors(made):
            self._known[id(tensor)] = tensor
            if locks:
                self._page_locked.add(tensor.untyped_storage().data_ptr())
        return made

    def launch(self, *args, **kwargs):
        """A kernel that does nothing with its arguments, all of which are on the device."""
        self.launches += 1
        assert all(id(tensor) in self._known and tensor.is_meta for tensor in self._tensors((args, kwargs)))

    def _check(self, operation, args, kwargs):
        tensors = self._tensors((args, kwargs))
        there, here = [each for each in tensors if each.is_meta], [each for each in tensors if not each.is_meta]
        assert all(id(tensor) in self._known for tensor in there), f"{operation} on an unrecorded copy"
        if operation in INDEXING:
            assert not any(tensor.dtype == torch.bool for tensor in self._tensors(args[1])), f"{operation} by a mask"
        if (operation == COPY and here and there) or (operation == MOVE and here and kwargs.get("device") == DEVICE):
            [source] = here
            assert operation == MOVE or args[1] is source, "a copy to the host"
            assert kwargs.get("non_blocking") or args[2:] == (True,), "an upload that is waited for"
            assert source.untyped_storage().data_ptr() in self._page_locked, "an upload of memory that may be moved"
            self.uploads += 1
        else:
            assert not (there and here), f"{operation} on tensors of both sides"

    @staticmethod
    def _tensors(values):
        return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
