"""The write of queries, keys and values, the kernel and its twin, against the formula in float64 and each other."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import kv_write as kernels
from kernels.kv_write import CANDIDATES, QkvWriteConfig
from kernels.reference import kv_write as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding to the dtype. No bfloat16 in the interpreter, which cuts off where it should round.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11}
if DEVICE == "cuda":
    ROUNDING[torch.bfloat16] = 2**-8
# Float32 between two roundings: root, quotient, cosine and sine to 2 units each, as on a GPU, sums and products.
PRODUCT_ROUNDING = 8 * 2**-24
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING))
TWINS = pytest.mark.parametrize("write", [kernels, reference], ids=["kernel", "reference"])
NORMS = pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
# heads, kv_heads, head_dim
SHAPES = pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 80), (14, 2, 96), (8, 1, 128), (3, 1, 6)], ids=str)
SMALL = (6, 2, 16)
EPS = 1e-5
SLOTS = 40
NAN = float("nan")


class Case:
    """Tokens at scattered slots of a cache full of NaN; every third one is padding."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, norm: bool, tokens: int = 7):
        self.heads, self.kv_heads, self.head_dim = shape
        self.random = torch.Generator().manual_seed(sum(shape) + norm)
        rows = self.heads + 2 * self.kv_heads
        # A slice of wider rows, as a projection with other outputs beside it would make.
        self.wide = self.randn(tokens, rows + 1, self.head_dim).to(dtype)
        self.qkv = self.wide[:, :rows]
        self.positions = torch.tensor([0, 1, 5, 100_000, 17, 4095, 31_337][:tokens], device=DEVICE)
        self.slots = torch.randperm(SLOTS, generator=self.random)[:tokens].to(DEVICE)
        self.slots[2::3] = -1
        self.frequencies = 10_000 ** -torch.linspace(0, 1, self.head_dim // 2, device=DEVICE)
        self.weights = tuple((1 + self.randn(self.head_dim) / 4).to(dtype) if norm else None for _ in range(2))
        self.kv = torch.full((SLOTS, 2, self.kv_heads, self.head_dim), NAN, dtype=dtype, device=DEVICE)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(DEVICE)

    def write(self, module: ModuleType, *options: object, **turning: object) -> tuple[Tensor, Tensor]:
        """The wide rows and the cache after the write; those of the case do not change."""
        wide, kv = self.wide.clone(), self.kv.clone()
        qkv = wide[:, : self.qkv.shape[1]]
        module.qkv_write(qkv, self.positions, self.slots, self.frequencies, *self.weights, EPS, kv, *options, **turning)
        return wide, kv

    def exact(self, scale: float, dims: int | None = None, interleaved: bool = False) -> tuple[Tensor, Tensor]:
        """Turned queries and keys of all tokens, and the sum of the absolute values of the two products of each."""
        x = self.qkv[:, : self.heads + self.kv_heads].double()
        q_weight, k_weight = self.weights
        if q_weight is not None:
            weight = torch.cat((q_weight.expand(self.heads, -1), k_weight.expand(self.kv_heads, -1))).double()
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        dims = self.head_dim if dims is None else dims
        x, kept = x[..., :dims], x[..., dims:]
        pairs = torch.arange(dims).view(-1, 2) if interleaved else torch.arange(dims).view(2, -1).T
        a, b = x[..., pairs[:, 0]], x[..., pairs[:, 1]]
        frequencies = self.frequencies[: dims // 2]
        angles = (self.positions.float()[:, None, None] * frequencies).double()  # an angle is a float32 product
        cos, sin = angles.cos() * scale, angles.sin() * scale
        terms = torch.stack((a * cos, -b * sin)), torch.stack((b * cos, a * sin))
        order = pairs.T.flatten().argsort()
        turned = torch.cat([term.sum(0) for term in terms], -1)[..., order]
        products = torch.cat([term.abs().sum(0) for term in terms], -1)[..., order]
        return torch.cat((turned, kept), -1), torch.cat((products, kept.abs()), -1)

    def check(
        self, wide: Tensor, kv: Tensor, scale: float = 1.0, dims: int | None = None, interleaved: bool = False
    ) -> None:
        exact, products = self.exact(scale, dims, interleaved)
        # Norm, cosine or sine, product and sum are each rounded to the dtype.
        bound = (4 * ROUNDING[kv.dtype] + PRODUCT_ROUNDING) * products + 2**-24
        kept = self.slots >= 0
        slots = self.slots[kept]
        turned = torch.cat((wide[kept, : self.heads], kv[slots, 0]), 1).double()
        assert ((turned - exact[kept]).abs() <= bound[kept]).all()
        assert same_bits(kv[slots, 1], self.qkv[kept, self.heads + self.kv_heads :])
        untouched = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
        untouched[slots] = False
        assert same_bits(kv[untouched], self.kv[untouched])
        assert same_bits(wide[~kept], self.wide[~kept])
        assert same_bits(wide[:, self.heads :], self.wide[:, self.heads :])


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@DTYPES
@SHAPES
@NORMS
@TWINS
def test_the_write_is_its_formula_and_touches_nothing_else(write: ModuleType, norm: bool, shape, dtype) -> None:
    case = Case(shape, dtype, norm)
    case.check(*case.write(write))


@NORMS
@TWINS
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dims", [0, 2, 12, 16, 24])
def test_some_dimensions_turn_in_pairs_and_the_others_stay(
    write: ModuleType, dims: int, interleaved: bool, norm: bool
) -> None:
    case, turning = Case((6, 2, 24), torch.float32, norm), {"rotary_dim": dims, "interleaved": interleaved}
    case.check(*case.write(write, 1.3, **turning), 1.3, dims, interleaved)


@DTYPES
@SHAPES
@NORMS
def test_the_kernel_and_its_twin_round_alike(norm: bool, shape, dtype: torch.dtype) -> None:
    case = Case(shape, dtype, norm)
    kept = case.slots >= 0
    (wide, kv), (twin_wide, twin_kv) = case.write(kernels), case.write(reference)
    turned, twin = (
        torch.cat((w[kept, : case.heads], c[case.slots[kept], 0]), 1) for w, c in ((wide, kv), (twin_wide, twin_kv))
    )
    if dtype == torch.float32:
        _, products = case.exact(1.0)
        assert ((turned - twin).abs() <= PRODUCT_ROUNDING * products[kept]).all()
    else:
        # Five roundings, each of them decided by float32's few units in about one of 2⁹ values at most.
        assert (turned == twin).double().mean() >= 1 - 5 * 2**-9


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
@NORMS
def test_every_candidate_is_right(norm: bool, config: QkvWriteConfig) -> None:
    case = Case((9, 3, 16), torch.float32, norm)
    case.check(*case.write(kernels, 1.0, config))


@TWINS
def test_a_rotary_scale_is_a_factor_of_cosine_and_sine(write: ModuleType) -> None:
    case = Case(SMALL, torch.float32, norm=True)
    case.check(*case.write(write, 1.25), scale=1.25)


@TWINS
def test_positions_and_slots_may_be_int32(write: ModuleType) -> None:
    case = Case(SMALL, torch.float32, norm=True)
    case.positions, case.slots = case.positions.int(), case.slots.int()
    case.check(*case.write(write))


@TWINS
@NORMS
def test_a_head_that_is_not_finite_breaks_itself_alone(write: ModuleType, norm: bool) -> None:
    case = Case(SMALL, torch.float32, norm)
    clean_wide, clean_kv = case.write(write)
    case.wide[0, 1], case.wide[0, 6], case.wide[0, 9, 3] = NAN, float("inf"), NAN  # a query, a key and a value
    with np.errstate(invalid="ignore"):  # the interpreter warns of NaN
        wide, kv = case.write(write)
    slot = case.slots[0]
    assert not wide[0, 1].isfinite().any()
    assert not kv[slot, 0, 0].isfinite().any()
    assert same_bits(kv[slot, 1], case.wide[0, 8:10])
    wide[0, [1, 6, 9]], kv[slot, 0, 0], kv[slot, 1] = clean_wide[0, [1, 6, 9]], clean_kv[slot, 0, 0], clean_kv[slot, 1]
    assert same_bits(wide, clean_wide)
    assert same_bits(kv, clean_kv)


@DTYPES
def test_a_launch_serves_whatever_its_buffers_hold_when_it_is_repeated(dtype: torch.dtype) -> None:
    case = Case(SMALL, dtype, norm=True)
    wide, kv, positions, slots = case.wide.clone(), case.kv.clone(), case.positions.clone(), case.slots.clone()

    def launch() -> None:
        qkv = wide[:, : case.qkv.shape[1]]
        kernels.qkv_write(qkv, positions, slots, case.frequencies, *case.weights, EPS, kv)

    replay = launch
    if DEVICE == "cuda":
        launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        replay = graph.replay
    for used in (0, 1, 4, 7):
        case.wide.copy_(case.randn(*case.wide.shape))
        case.positions.copy_(case.positions.flip(0))
        case.slots[:] = -1
        case.slots[:used] = torch.randperm(SLOTS, generator=case.random)[:used].to(DEVICE)
        for buffer, contents in ((wide, case.wide), (kv, case.kv), (positions, case.positions), (slots, case.slots)):
            buffer.copy_(contents)
        replay()
        case.check(wide, kv)


def test_a_batch_of_no_tokens_is_no_launch() -> None:
    case = Case(SMALL, torch.float32, norm=True, tokens=0)
    case.check(*case.write(kernels))
