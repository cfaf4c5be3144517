"""A quicker Triton interpreter for tests on a CPU."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any


def quicken_the_interpreter() -> None:
    """Skip two pieces of work of Triton 3.9's interpreter that change no result. Other versions stay as they are.

    It patches triton.language at a launch, and again at each call of a jit function within the kernel, `tl.sum` and
    `tl.max` among them: 40 % of the time of test_sampling.py (47 s of CPU time, 28 s without). Once is enough for a
    module: patches at a launch are undone when it ends and made again at the next one, the others last. It also
    computes whether an integer operation overflows, and asserts that in debug mode only: 45 % of the time that is left.
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
