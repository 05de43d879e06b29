"""CRC32C, the checksum of TensorFlow's files, computed on whole arrays.

The bits of a message are the coefficients of one long polynomial over GF(2), and a CRC is the
remainder of its division by a fixed polynomial P of degree 32. The usual loop over all bytes is
slow in Python. Here most of the division is done by a few XORs of large slices: the polynomial

    f(x) = x^290 + x^136 + x^113 + x^107 + x^32 + 1

is a multiple of P, so modulo P the term x^290 equals the sum of the other five. A leading bit of
the message may be removed, then, if the five bits that lie 154, 177, 183, 258 and 290 places behind
it are flipped. Squaring f doubles every exponent and gives another multiple of P: f^8 says the same
of bytes, and f^(8 * 2^k) of bytes 2^k times as far apart, so that a long stretch can be removed at
once. The last 290 bytes are divided bit by bit, with a table of x^i modulo P.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import UInt8, UInt32
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray

POLYNOMIAL = 0x82F63B78  # P, Castagnoli's; bit 31 is the coefficient of x^0
SPAN = 290  # the degree of f
STEPS = tuple(SPAN - exponent for exponent in (136, 113, 107, 32, 0))


def crc32c(data: Buffer) -> int:
    """Return the CRC32C of bytes or a contiguous array, as RFC 3720 (appendix B.4) defines it."""
    data = np.frombuffer(data, np.uint8)
    register = np.full(4, 255, np.uint8)
    for start in range(0, len(data), 1 << 20):
        message = np.append(data[start : start + (1 << 20)], np.zeros(4, np.uint8))
        message[:4] ^= register
        register = remainder(message)
    return int(register.view("<u4")[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: Buffer) -> int:
    """Return the CRC32C as LevelDB and TensorFlow store it: rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def remainder(message: UInt8[ndarray, " N"]) -> UInt8[ndarray, " 4"]:
    """Return a message modulo P as four bytes; overwrites the message."""
    while len(message) > SPAN:
        scale = 1 << ((len(message) - 1) // SPAN).bit_length() - 1  # the largest that fits
        n = min(len(message) - scale * SPAN, scale * STEPS[0])
        for step in STEPS:
            message[scale * step :][:n] ^= message[:n]
        message = message[n:]
    bits = np.unpackbits(message, bitorder="little").view(bool)
    terms = powers_of_x()[-len(bits) :][bits]
    return np.bitwise_xor.reduce(terms, keepdims=True).view(np.uint8)


@functools.cache
def powers_of_x() -> UInt32[ndarray, " N"]:
    """Return x^i modulo P for i = 8 * SPAN - 1, ..., 1, 0."""
    powers = [1 << 31]
    while len(powers) < 8 * SPAN:
        last = powers[-1]
        powers.append(last >> 1 ^ (POLYNOMIAL if last & 1 else 0))
    return np.array(powers[::-1], "<u4")
