"""Which modules of a checkpoint hold quantised weights, by the tensors that its files name."""

from collections.abc import Callable, Collection, Iterable

from torch import Tensor

from runtime.quantization.formats import Format, InvalidWeight, Shape, formats_of
from runtime.quantization.scheme import Scheme
from runtime.quantization.weight import QuantizedWeight

# Scales of activations and of K/V, which are not quantised here.
IGNORED = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".output_scale",
    ".output_zero_point",
    ".q_scale",
    ".k_scale",
    ".k_zero_point",
    ".v_scale",
    ".v_zero_point",
    ".kv_scale",
    ".prob_scale",
)


class QuantizedModules:
    """The quantised ones of `modules`, of a checkpoint that has tensors of these names."""

    def __init__(self, scheme: Scheme | None, modules: Iterable[str], names: Collection[str]):
        self.scheme = scheme
        self._found: dict[str, Format] = {}
        for module in modules:
            for one in () if scheme is None else formats_of(scheme):
                if module + one.marker in names:
                    self._found[module] = one
                    break
        self._names = names

    def __contains__(self, module: str) -> bool:
        return module in self._found

    def __len__(self) -> int:
        return len(self._found)

    def needed(self, module: str) -> list[str]:
        """The tensors that a quantised module must have."""
        return [module + suffix for suffix in self._found[module].needs]

    def ignored(self) -> set[str]:
        """Tensors that may be there beside the needed ones."""
        if self.scheme is None:
            return set()
        found = {module + suffix for module, one in self._found.items() for suffix in one.may}
        return found | {name for name in self._names if name.endswith(IGNORED)}

    def read(self, module: str, shape: Shape, get: Callable[[str], Tensor]) -> QuantizedWeight:
        """The weight of a quantised module. Raises InvalidWeight, naming the module."""
        assert self.scheme is not None
        one = self._found[module]
        suffixes = [suffix for suffix in one.needs + one.may if module + suffix in self._names]
        try:
            return one.read(self.scheme, shape, {suffix: get(module + suffix) for suffix in suffixes})
        except InvalidWeight as error:
            raise InvalidWeight(f"{module} ({self.scheme.method}): {error}") from None
