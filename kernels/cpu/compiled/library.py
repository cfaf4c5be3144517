"""The compiled kernels as a ctypes library. Its calls release the interpreter's lock."""

import ctypes
from ctypes import c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache

from kernels.cpu.compiled.build import CannotBuild, library


@cache
def load() -> ctypes.CDLL:
    """Load the library, built first if need be. Raises build.CannotBuild."""
    path = library()
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:  # a directory whose files may not be executed, a file of another system
        raise CannotBuild(f"{path} cannot be loaded: {error}; set XDG_CACHE_HOME to another directory") from None
    signatures = {
        "lanes": ([], c_int),
        "rounds_rows": ([], c_int),
        "looks_up_bytes": ([], c_int),
        "shared": ([c_void_p], None),
        "partial_floats": ([c_int], c_size_t),
        "pool_new": ([c_int], c_void_p),
        "pool_delete": ([c_void_p], None),
        "program_run": ([c_void_p, c_void_p, c_int, c_void_p], None),
        "panels_bytes": ([c_int, c_int, c_int, c_int], c_size_t),
        "panels_write": ([c_int, c_void_p, c_int64, c_int64, *[c_int] * 4, c_void_p], None),
        "panels_write_codes": ([c_int, c_void_p, c_void_p, c_void_p, *[c_int] * 4, c_void_p], None),
        "panels_squares": (
            [c_int, c_void_p, *[c_int] * 5, c_void_p, c_void_p, c_int, c_float, c_int, c_void_p],
            None,
        ),
        "panels_quantize": ([c_int, c_int, c_void_p, c_int64, *[c_int] * 4, c_void_p], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = arguments, result
    return functions


def instructions() -> str:
    """The widest instructions that the library was compiled for."""
    lanes: int = load().lanes()
    return {16: "AVX-512", 8: "AVX2"}.get(lanes, f"{lanes} lanes") + (", BF16" if rounds_rows() else "")


def rounds_rows() -> bool:
    """Whether rows are rounded to bfloat16 before they are multiplied with a base's weights in bfloat16."""
    return bool(load().rounds_rows())


def looks_up_bytes() -> bool:
    """Whether nf4's numbers are two bytes each, and rows integers of 16 bits, where they are multiplied."""
    return bool(load().looks_up_bytes())
