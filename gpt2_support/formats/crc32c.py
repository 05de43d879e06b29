"""CRC32C, which guards TensorFlow's files, in whole-array steps."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


# CRC32C, which guards TensorFlow's files. A CRC is the remainder of the message, read as one long
# polynomial over GF(2), after division by P. Now x^290 + x^136 + x^113 + x^107 + x^32 + 1 is a
# multiple of P, and so are its square x^580 + x^272 + ... + 1 and every further square. Modulo P
# a leading part of the message may therefore be struck out and added (XOR) at five places further
# on: whole arrays at once. The 290 bytes that remain are looked up bit by bit in a table of x^i.

CRC_POLYNOMIAL = 0x82F63B78  # P, Castagnoli's; bit 31 is the coefficient of x^0


CRC_SPAN = 290


CRC_STEPS = tuple(CRC_SPAN - exponent for exponent in (136, 113, 107, 32, 0))


@functools.cache
def crc_table():
    """Return x^i modulo P for i = 8 CRC_SPAN - 1, ..., 1, 0 (uint32)."""
    powers = [1 << 31]
    while len(powers) < 8 * CRC_SPAN:
        last = powers[-1]
        powers.append(last >> 1 ^ (CRC_POLYNOMIAL if last & 1 else 0))
    return np.array(powers[::-1], "<u4")


def crc_remainder(message):
    """Return the message (uint8, overwritten) modulo P as four bytes."""
    while len(message) > CRC_SPAN:
        scale = 1 << ((len(message) - 1) // CRC_SPAN).bit_length() - 1
        n = min(len(message) - scale * CRC_SPAN, scale * CRC_STEPS[0])
        for step in CRC_STEPS:
            message[scale * step :][:n] ^= message[:n]
        message = message[n:]
    bits = np.unpackbits(message, bitorder="little").view(bool)
    terms = crc_table()[-len(bits) :][bits]
    return np.bitwise_xor.reduce(terms, keepdims=True).view(np.uint8)


def crc32c(data: Buffer) -> int:
    """Return the CRC32C (RFC 3720, appendix B.4) of bytes or a contiguous array, as an int."""
    data = np.frombuffer(data, np.uint8)
    register = np.full(4, 255, np.uint8)
    for start in range(0, len(data), 1 << 20):
        message = np.append(data[start : start + (1 << 20)], np.zeros(4, np.uint8))
        message[:4] ^= register
        register = crc_remainder(message)
    return int(register.view("<u4")[0]) ^ 0xFFFFFFFF


def masked_crc32c(data):
    """Return the CRC32C as LevelDB and TensorFlow store it: rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
