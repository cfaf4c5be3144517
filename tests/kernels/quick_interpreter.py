"""A quicker Triton interpreter for tests on a CPU."""

import functools
from dataclasses import replace
from importlib.util import find_spec
from typing import Any


def quicken_the_interpreter() -> None:
    """Skip work of Triton 3.9's interpreter that changes no result. Other versions stay as they are.

    It patches triton.language at a launch, and again at each call of a jit function within the kernel, `tl.sum` and
    `tl.max` among them: 40 % of the time of test_sampling.py (47 s of CPU time, 28 s without). Once is enough for a
    module: patches at a launch are undone when it ends and made again at the next one, the others last. It also
    computes whether an integer operation overflows, and asserts that in debug mode only: 45 % of the time that is left.
    The types of its values are worked out again for every operation, though there are few: see `_remember_types`.
    """
    if find_spec("triton") is None:
        return
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.9."):
        return

    patched: set[int] = set()  # the globals of modules

    def call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    if triton.knobs.runtime.interpret:
        _remember_types(interpreter)


def _remember_types(interpreter: Any) -> None:
    """Work out once what depends on types and shapes alone, and find at once that two are the same."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    if hasattr(core.block_type.__init__, "quick"):
        return
    block_init, tensor_init, same_type = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
    np_dtype = interpreter._get_np_dtype
    broadcast, computation_type = TritonSemantic.broadcast_impl_value, TritonSemantic.computation_type_impl

    @functools.cache
    def of_shape(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
        """The shape and the number of elements of a block, and the shape as its name has it."""
        block = core.block_type.__new__(core.block_type)
        block_init(block, core.int8, list(sizes))
        return block.shape, block.numel, str(block.shape)

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(core._unwrap_if_constexpr(size) for size in core._unwrap_if_constexpr(shape))
        self.shape, self.numel, text = of_shape(sizes)
        self.element_ty = element_ty
        self.name = f"<{text}, {element_ty}>"

    init_block.quick = True  # type: ignore[attr-defined]

    @functools.cache
    def as_constants(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        """The number of elements and the shape of a tensor."""
        tensor = core.tensor.__new__(core.tensor)
        tensor_init(tensor, None, core.block_type(core.int8, list(sizes)) if sizes else core.int8)
        return tensor.numel, tensor.shape

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = as_constants(tuple(type.shape.values) if type.is_block() else ())

    def equal(self: Any, other: Any) -> bool:
        return self is other or same_type(self, other)

    np_dtypes: dict[str, Any] = {}  # by the name of a type's scalars

    def quick_np_dtype(of: Any) -> Any:
        name = of.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(of)
        return np_dtypes[name]

    computed: dict[tuple[str, bool, str, bool, bool], Any] = {}

    def quick_computation_type(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, division: bool) -> Any:
        key = (a.name, a_is_scalar, b.name, b_is_scalar, division)
        if key not in computed:
            computed[key] = computation_type(self, a, a_is_scalar, b, b_is_scalar, division)
        return computed[key]

    def quick_broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block() == b.is_block() and (not a.is_block() or a.shape.values == b.shape.values):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__ = init_block, init_tensor, equal
    interpreter._get_np_dtype = quick_np_dtype
    TritonSemantic.computation_type_impl = quick_computation_type
    TritonSemantic.broadcast_impl_value = quick_broadcast
