"""What the five programs are built on, one module per concern; it imports none of them."""

# OpenBLAS reads its settings when NumPy is first imported, so this comes before any other room.
from gpt2_support import blas as blas

__version__ = "0.2.0"  # the only place; pyproject.toml reads it from here
