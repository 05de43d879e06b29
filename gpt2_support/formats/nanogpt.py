"""nanoGPT's files of token ids, which its `prepare.py` writes: uint16, without a header.

https://github.com/karpathy/nanoGPT
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_support.files import open_file
from gpt2_support.formats.llmc import read_values

if TYPE_CHECKING:
    from jaxtyping import UInt16
    from numpy import ndarray


def load_tokens(path: str | Path) -> UInt16[ndarray, " N"]:
    """Return the ids of a file of uint16, (N,); one of more than 64 MB is memory-mapped.

    Raises FileNotFoundError, or ValueError if its bytes are of an odd number.
    """
    with open_file(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes % 2:
            raise ValueError(f"{path}: {n_bytes} bytes, an odd number: these are not uint16")
        return read_values(file, "<u2", header_bytes=0)
