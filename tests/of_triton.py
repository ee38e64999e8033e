"""Bounds of machine code by the version of Triton: those in the tests are of 3.8.

3.6 and 3.7 fetch log-sum-exps in pieces of 4 bytes, up to 108 of them, and keep more addresses. Loops of local
attention take up to 31 % more instructions (dkv, head_dim 64), those of routed attention 24 %, and 86 % with regions of
49 tokens. A few words lie on the stack around loops; none is touched inside one, but for the float32
loops named in test_local.py and one word of the gradient of MoH's table.
"""

import triton
from packaging.version import Version

OLD = Version(triton.__version__) < Version("3.8")


def instructions(of_3_8: float, more: float = 0.32) -> float:
    """The most instructions a logit, where old versions may take a share `more`."""
    return of_3_8 * (1 + more) if OLD else of_3_8


def stack_bytes(of_3_8: int = 0) -> int:
    """The most bytes of stack outside loops."""
    return max(of_3_8, 16) if OLD else of_3_8
