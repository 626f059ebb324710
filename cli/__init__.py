"""The ``ptq`` command."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
"""Large tensors in huge pages, which torch asks the system for when it is loaded with this: a fresh tensor of a block
costs a fifth of the time, and copying, rounding and packing are little else."""
