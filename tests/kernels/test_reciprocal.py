from __future__ import annotations

import torch

from tuckaway_kernels.reciprocal import flush, multiply, reciprocal, reciprocal_table

TINY = torch.finfo(torch.float32).tiny


def test_differs_from_ieee_by_at_most_one_unit_as_an_h100_does() -> None:
    table = reciprocal_table(torch.device("cpu"))
    assert table.shape == (1 << 23,)
    assert {i: int((table == i).sum()) for i in (-1, 0, 1)} == {-1: 374_723, 0: 7_280_086, 1: 733_799}


def test_the_difference_depends_on_the_mantissa_alone() -> None:
    mantissa = torch.randint(1 << 23, (1000,), dtype=torch.int32)
    table = reciprocal_table(torch.device("cpu"))
    for exponent in (1, 60, 127, 252):
        x = (mantissa + (exponent << 23)).view(torch.float32)
        units = reciprocal(x).view(torch.int32) - (1 / x).view(torch.int32)
        assert torch.equal(units, table[mantissa].int())


def test_subnormal_numbers_are_zeros_on_both_sides() -> None:
    x = torch.tensor([0.0, -0.0, TINY / 2, -TINY / 2, 2.0**126, 2.0**126 * 1.5, -(2.0**127), torch.inf, TINY])
    inf = torch.inf
    assert reciprocal(x).tolist() == [inf, -inf, inf, -inf, TINY, 0.0, 0.0, 0.0, 2.0**126]


def test_powers_of_two_are_exact() -> None:
    x = 2.0 ** torch.arange(-126.0, 127.0)
    assert torch.equal(reciprocal(x), 1 / x)


def test_flush_keeps_the_sign_of_what_it_makes_zero() -> None:
    x = torch.tensor([TINY / 2, -TINY / 2, TINY, -TINY, torch.inf])
    assert flush(x).tolist() == [0.0, 0.0, TINY, -TINY, torch.inf]
    assert torch.signbit(flush(x)).tolist() == [False, True, False, True, False]
    assert flush(torch.tensor([torch.nan])).isnan().all()


def test_a_product_is_flushed_by_its_value_in_24_bits() -> None:
    """Just below 2**-126 a CPU rounds up earlier than a GPU: its numbers there are twice as far apart."""
    short = (0.39, 0.73)  # of 2**-150, by which the first two products fall short of 2**-126
    x = torch.tensor([float.fromhex("0x1.4242fp-60"), float.fromhex("-0x1.dbcf3p-60"), -(2.0**-62), -1.5])
    y = torch.tensor([float.fromhex("0x1.96b9c2p-67"), float.fromhex("0x1.1378cp-67"), 2.0**-64, TINY])
    exact = x.double() * y.double()
    assert [round(float(1 - p.abs() / TINY) * 2**24, 2) for p in exact[:2]] == list(short)
    assert (x * y).tolist() == [TINY, -TINY, -TINY, -1.5 * TINY]
    assert multiply(x, y).tolist() == [TINY, 0.0, -TINY, -1.5 * TINY]
    assert torch.signbit(multiply(x, y)).tolist() == [False, True, True, True]


def test_a_product_of_subnormal_numbers_zeros_and_infinities() -> None:
    x, y = torch.tensor([TINY / 2, 0.0, torch.inf, torch.nan]), torch.tensor([4.0, -1.0, -1.0, 1.0])
    assert multiply(x, y)[:3].tolist() == [0.0, 0.0, -torch.inf]
    assert torch.signbit(multiply(x, y))[:3].tolist() == [False, True, True]
    assert multiply(x, y)[3].isnan()
