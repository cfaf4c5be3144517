"""The structures of the C++ kernels, field by field; their meaning is documented in the header that each names."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

PANEL = 16  # panels.h
PARTITION = 128  # attention.h
TILE = 16  # kv.h
MOST_PARTS = 3  # step.h


class Rows(ctypes.Structure):
    """step.h"""

    _fields_ = [("at", c_void_p), ("stride", c_int64)]


class LoraPart(ctypes.Structure):
    """step.h"""

    _fields_ = [
        ("b", c_void_p),
        ("bias", c_void_p),
        ("first_rank", c_int32),
        ("ranks", c_int32),
        *[(name, c_void_p) for name in ("gain", "weight", "tokens", "rows")],
        ("type", c_int32),
        ("count", c_int32),
    ]


class LoraSite(ctypes.Structure):
    """step.h"""

    _fields_ = [
        ("a", c_void_p),
        ("scales", c_void_p),
        ("ranks", c_int32),
        ("type", c_int32),
        ("parts", LoraPart * MOST_PARTS),
    ]


class Run(ctypes.Structure):
    """step.h"""

    _fields_ = [("first", c_int32), ("last", c_int32), ("sites", c_void_p)]


class Queries(ctypes.Structure):
    """step.h"""

    _fields_ = [
        ("row", c_int32),
        ("count", c_int32),
        ("position", c_int32),
        ("visible", c_int32),
        ("blocks", c_void_p),
        ("partials", c_void_p),
        ("arrived", c_void_p),
    ]


class Step(ctypes.Structure):
    """step.h"""

    _fields_ = [
        *[(name, c_int32) for name in ("rows", "logits", "runs", "logit_runs", "queries")],
        *[(name, c_void_p) for name in ("token_ids", "slots", "cosines", "sines", "logit_rows")],
        *[(name, c_void_p) for name in ("run", "logit_run", "query")],
        ("shrunk", Rows),
    ]


class LinearPart(ctypes.Structure):
    """linear.h"""

    _fields_ = [("panels", c_void_p), ("bias", c_void_p), ("columns", c_int32), ("first", c_int32)]


class Linear(ctypes.Structure):
    """linear.h"""

    _fields_ = [
        ("x", Rows),
        ("out", Rows),
        ("part", LinearPart * MOST_PARTS),
        ("order", c_void_p),
        *[(name, c_int32) for name in ("parts", "k", "type", "group", "site", "logits", "form")],
        ("scale", c_float),
        ("gates", Rows),
    ]


class Embed(ctypes.Structure):
    """elementwise.h"""

    _fields_ = [
        ("out", Rows),
        ("panels", c_void_p),
        *[(name, c_int32) for name in ("hidden", "type", "site")],
        ("scale", c_float),
    ]


class RmsNorm(ctypes.Structure):
    """elementwise.h"""

    _fields_ = [
        ("x", Rows),
        ("out", Rows),
        ("weight", c_void_p),
        *[(name, c_int32) for name in ("size", "logits", "add", "site")],
        ("eps", c_float),
    ]


class RotateWrite(ctypes.Structure):
    """elementwise.h"""

    _fields_ = [
        ("qkv", Rows),
        *[(name, c_void_p) for name in ("kv", "query_norm", "key_norm")],
        *[(name, c_int32) for name in ("heads", "kv_heads", "head_dim", "type")],
        *[(name, c_int32) for name in ("whole", "rope", "turned", "interleaved")],
        ("eps", c_float),
    ]


class Attention(ctypes.Structure):
    """attention.h"""

    _fields_ = [
        ("q", Rows),
        ("out", Rows),
        ("kv", c_void_p),
        ("sinks", c_void_p),
        *[(name, c_int32) for name in ("heads", "kv_heads", "head_dim", "block_size", "type", "window")],
        *[(name, c_float) for name in ("scale", "cap")],
    ]


class Best(ctypes.Structure):
    """logits.h"""

    _fields_ = [("highest", c_float), ("index", c_int32), ("log_total", c_float)]


class FindBest(ctypes.Structure):
    """logits.h"""

    _fields_ = [("logits", Rows), ("best", c_void_p), ("size", c_int32)]


class Experts(ctypes.Structure):
    """experts.h"""

    _fields_ = [
        *[(name, Rows) for name in ("x", "scores", "gathered", "inner", "out")],
        *[(name, c_void_p) for name in ("linears", "choices", "weights", "places", "sources", "firsts")],
        *[(name, c_int32) for name in ("experts", "chosen", "hidden", "normalised")],
        ("scale", c_float),
    ]


class Operation(ctypes.Structure):
    """program.cpp"""

    _fields_ = [("kind", c_int64), ("arguments", c_void_p)]


KINDS = (Embed, RmsNorm, Linear, RotateWrite, Attention, FindBest, Experts)  # an operation's kind is its place here


def shared() -> list[int]:
    """What the library has to agree to: constants, and the size of each structure."""
    sizes = [Rows, LoraPart, LoraSite, Run, Queries, Step, LinearPart, Linear, Embed, RmsNorm, RotateWrite, Attention]
    return [PANEL, PARTITION, TILE, MOST_PARTS, *map(ctypes.sizeof, [*sizes, Best, FindBest, Experts, Operation])]
