"""CRC-32, in any order: :func:`crc32` of parts and :func:`crc32_combine` of what they gave.

It is zlib's, which every Python has: a checksum that a machine cannot compute protects nothing. Parts of a tensor are
summed by the threads that read them, in whatever order they come, and the sums are combined; xxh3 cannot do that, nor
is it faster where it counts: from the last cache and from memory both come at what these give. CRC-32 finds every
burst of up to 32 wrong bits and misses one longer accident in 2**32; it is no defence against an attacker.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

__all__ = ["crc32", "crc32_combine", "is_fast"]

_POLYNOMIAL = 0xEDB88320  # reflected: the coefficient of x**0 is the highest bit


@lru_cache(maxsize=1)
def _fastest() -> Callable[[Any, int], int]:
    """Return zlib-ng's implementation, 65 GB/s, or zlib's where there is no wheel of it, 1 to 7: the same values."""
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        return zlib.crc32
    return zlib_ng.crc32


def is_fast() -> bool:
    """Whether checksums are computed at the speed of memory: zlib-ng is installed."""
    return _fastest() is not zlib.crc32


def crc32(data: Any, value: int = 0) -> int:
    """Return the CRC-32 of a contiguous buffer's bytes, going on from ``value``.

    >>> f"{crc32(b'123456789'):08x}", crc32(b"89", crc32(b"1234567")) == crc32(b"123456789")
    ('cbf43926', True)
    """
    return _fastest()(data, value)


def crc32_combine(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two runs of bytes, one behind the other, from the CRC-32 of each.

    Args:
        first: of the run in front.
        second: of the run behind it.
        second_bytes: the length of the run behind.

    >>> crc32_combine(crc32(b"1234567"), crc32(b"89"), 2) == crc32(b"123456789")
    True
    """
    return _multiply(_power(second_bytes), first) ^ second


def _multiply(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2), modulo the CRC's."""
    product = 0
    while b:  # from x**0 (the highest bit) up
        if b & 0x80000000:
            product ^= a
        b = (b << 1) & 0xFFFFFFFF
        a = (a >> 1) ^ (_POLYNOMIAL if a & 1 else 0)
    return product


@lru_cache(maxsize=1024)  # pieces come in few lengths
def _power(nbytes: int) -> int:
    """Return x**(8 * nbytes) modulo the CRC's polynomial: what so many bytes behind a run multiply its CRC by."""
    result, square = 0x80000000, 0x00800000  # 1, and x**8
    while nbytes:
        if nbytes & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        nbytes >>= 1
    return result
