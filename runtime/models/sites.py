"""Where an adapter can add to what a model computes."""

from typing import NamedTuple


class Part(NamedTuple):
    """One projection of the checkpoint, as a part of a stacked site."""

    module: str  # its name in the checkpoint
    out_features: int


class Site(NamedTuple):
    """One fused projection, to which an adapter can add."""

    in_features: int
    parts: tuple[Part, ...]  # stacked along the output
