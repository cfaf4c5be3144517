"""Rows of the offset table: the fields of each part, and the entries that are refused."""

import pytest

from kernels.offset_table import BIAS, FIELDS, GAIN, NO_BIAS, RANKS, A, B, PartEntry, SiteEntry, table_rows


def test_a_tables_row_says_where_each_part_lies() -> None:
    q, v = PartEntry(rank=4, b=64, bias=128), PartEntry(rank=3, b=256, gain=384)
    rows = table_rows([None, SiteEntry(a=32, parts=[q, None, v])], width=7)
    assert rows.shape == (2, FIELDS)
    assert not rows[0].any()
    row = rows[1].tolist()
    assert (row[A], row[RANKS:B], row[B], row[B + 2]) == (32, [0, 4, 4, 7], 64, 256)
    assert row[BIAS:GAIN] == [128, NO_BIAS, NO_BIAS]
    assert row[GAIN:] == [NO_BIAS, NO_BIAS, 384]


def test_what_the_kernels_would_leave_out_or_misread_does_not_enter_the_table() -> None:
    with pytest.raises(AssertionError, match="7 ranks, and there is room for 6"):
        table_rows([SiteEntry(0, [PartEntry(4, 0), PartEntry(3, 64)])], width=6)
    for site in (SiteEntry(8, [PartEntry(4, 0)]), SiteEntry(0, [PartEntry(4, 8)]), SiteEntry(0, [PartEntry(4, 0, 8)])):
        with pytest.raises(AssertionError, match="not aligned"):
            table_rows([site], width=64)
    for part in (PartEntry(1, 16, bias=0), PartEntry(1, 16, gain=0)):
        with pytest.raises(AssertionError, match="at element 0, which means none"):
            table_rows([SiteEntry(0, [part])], width=64)
    with pytest.raises(AssertionError, match="4 parts"):
        table_rows([SiteEntry(0, [PartEntry(1, 0)] * 4)], width=64)
