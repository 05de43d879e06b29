"""CRC32C against the definition and the examples of RFC 3720."""

import numpy as np
import openai_files
import pytest

from gpt2_support.formats import crc32c

RFC_3720 = {  # appendix B.4
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
    b"123456789": 0xE3069283,
    b"": 0,
}


@pytest.mark.parametrize("data", RFC_3720)
def test_crc32c_of_rfc_3720(data):
    assert crc32c.crc32c(data) == RFC_3720[data]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 285, 286, 287, 290, 291, 580, 581, 4001, 10000])
def test_crc32c_equals_the_definition(n):
    data = np.random.default_rng(n).bytes(n)
    assert crc32c.crc32c(data) == openai_files.slow_crc32c(data)


def test_crc32c_of_several_chunks_equals_table_lookup():
    data = np.random.default_rng(0).integers(0, 256, (1 << 20) + 12345, dtype=np.uint8)
    expected = int.from_bytes(openai_files.masked_crc(data), "little")
    assert crc32c.masked_crc32c(data) == expected
    assert crc32c.masked_crc32c(data[: 1 << 20].view("<f4").reshape(512, 512)) != expected


def test_crc32c_leaves_its_input_alone():
    data = np.arange(2000, dtype=np.float32)
    crc32c.crc32c(data)
    assert np.array_equal(data, np.arange(2000))
