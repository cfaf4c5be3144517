"""Grouped LoRA products against a plain product row by row in float64."""

import itertools

import pytest
import torch

from kernels.cpu.grouped_lora import PartWeights, Run, SiteWeights, embedding_lora, grouped_lora

# The output is rounded to the model's dtype once, by half a unit in its last place; the float32 product before has
# an error of a few units of its largest partial sum.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
PRODUCT_ROUNDING = 4 * 2**-24

POPULARITY = {
    "distinct": list(range(9)),
    "uniform": [0, 3, 1, 2, 0, 1, 3, 2, 1],
    "zipf": [0, 0, 0, 0, 0, 1, 1, 2, 3],
    "identical": [2] * 9,
    "one row": [1],
    "base only": [None] * 9,
    "base among them": [0, None, None, 0, 1, None, 2, 2, None],
    "a long prefill": [0] * 70 + [1] * 3 + [None] * 2,
}
SHAPES = {
    "one part": (24, (40,)),
    "stacked": (33, (17, 5, 5)),
    "model-like": (576, (576, 192, 192)),
    "tiny": (1, (1, 1)),
}


def site_weights(widths, inputs, seed, adapted, bias, host):
    """Random weights for the parts in `adapted`, ranks differing; with numpy's views of them if `host`."""
    generator = torch.Generator().manual_seed(seed)
    parts, ranks = [], 0
    bounds = [0, *itertools.accumulate(widths)]
    for index in adapted:
        rank = (1, 4, 16, 3)[(seed + index) % 4]
        b = torch.randn(rank, widths[index], generator=generator)
        offset = torch.randn(widths[index], generator=generator) if bias else None
        parts.append(PartWeights(b, slice(*bounds[index : index + 2]), slice(ranks, ranks + rank), offset))
        ranks += rank
    weights = SiteWeights(torch.randn(ranks, inputs, generator=generator).t() / inputs**0.5, tuple(parts))
    return weights.on_host() if host else weights


def runs_of(popularity, adapters):
    """Consecutive rows under one adapter; those of the base are of no run."""
    runs, row = [], 0
    for adapter, group in itertools.groupby(popularity):
        count = len(list(group))
        if adapter is not None:
            runs.append(Run(row, row + count, adapters[adapter]))
        row += count
    return runs


def expected(y, x, popularity, adapters, site):
    """Row by row and part by part in float64."""
    result = y.double()
    for row, adapter in enumerate(popularity):
        weights = None if adapter is None else adapters[adapter][site]
        for part in () if weights is None else weights.parts:
            t = weights.a[:, part.ranks].t().double() @ x[row].double()
            result[row, part.columns] += t @ part.b.double() + (0 if part.bias is None else part.bias.double())
    return result


def magnitude(adapters):
    """The adapters with every weight's absolute value: their product bounds every partial sum of the true one."""
    return [
        [
            weights
            and SiteWeights(
                weights.a.abs(),
                tuple(p._replace(b=p.b.abs(), bias=None if p.bias is None else p.bias.abs()) for p in weights.parts),
            )
            for weights in sites
        ]
        for sites in adapters
    ]


def check(got, y, x, popularity, adapters, site):
    want = expected(y, x, popularity, adapters, site)
    sums = expected(y.abs(), x.abs(), popularity, magnitude(adapters), site)
    assert ((got.double() - want).abs() <= ROUNDING[got.dtype] * want.abs() + PRODUCT_ROUNDING * sums).all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("popularity", POPULARITY.values(), ids=POPULARITY.keys())
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("host", [False, True], ids=["torch", "numpy"])
def test_every_row_gets_its_own_adapters_product(dtype, shape, popularity, bias, host):
    inputs, widths = shape
    adapted = [range(len(widths)), range(1), range(len(widths) - 1, len(widths)), (0, len(widths) - 1)]
    adapters = [
        [None, site_weights(widths, inputs, seed, sorted(set(adapted[seed % 4])), bias, host)] for seed in range(9)
    ]
    adapters[3] = [None, None]  # adapts another site
    torch.manual_seed(len(popularity))
    x = torch.randn(len(popularity), inputs).to(dtype)
    y = torch.randn(len(popularity), sum(widths)).to(dtype)
    before, runs = y.clone(), runs_of(popularity, adapters)
    grouped_lora(y, x, 1, runs)
    check(y, before, x, popularity, adapters, 1)
    grouped_lora(y, x, 0, runs)
    for row, adapter in enumerate(popularity):
        untouched = torch.ones(sum(widths), dtype=torch.bool)
        weights = None if adapter is None else adapters[adapter][1]
        for part in () if weights is None else weights.parts:
            untouched[part.columns] = False
        assert torch.equal(y[row, untouched], before[row, untouched])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("host", [False, True], ids=["torch", "numpy"])
def test_rows_of_the_base_and_of_others_keep_their_bits_beside_infinities(dtype, host):
    adapters = [[site_weights((8, 8), 16, seed, (0, 1), False, host)] for seed in range(3)]
    x, y = torch.ones(5, 16, dtype=dtype), torch.full((5, 16), -0.0, dtype=dtype)
    clean, runs = y.clone(), runs_of([None, 0, 1, None, 2], adapters)
    grouped_lora(clean, x, 0, runs)
    x[1:3] = torch.inf
    x[0] = torch.nan
    grouped_lora(y, x, 0, runs)
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert y[0].signbit().all()
    assert torch.equal(y[3].signbit(), torch.ones(16, dtype=torch.bool))
    assert torch.equal(y[4], clean[4])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("popularity", POPULARITY.values(), ids=POPULARITY.keys())
def test_an_embeddings_rows_get_the_rows_of_their_tokens(dtype, popularity):
    vocab, width = 50, 24
    adapters = [[site_weights((width,), vocab, seed, (0,), False, False)] for seed in range(9)]
    torch.manual_seed(1)
    token_ids = torch.randint(vocab, (len(popularity),))
    x = torch.randn(len(popularity), width).to(dtype)
    before = x.clone()
    embedding_lora(x, token_ids, 0, runs_of(popularity, adapters))
    one_hot = torch.nn.functional.one_hot(token_ids, vocab)
    check(x, before, one_hot, popularity, adapters, 0)
    base = [adapter is None for adapter in popularity]
    assert torch.equal(x[base], before[base])
