"""Traffic between memory and a cache that exact attention needs, in words, for one head without batch.

Bound      Saha and Ye 2024, arXiv:2402.07443: Theta(N^2 d^2 / M) words for a cache of M >= d^2 words, attained by
           FlashAttention; Theta(N^2 d / sqrt(M)) for smaller caches (standard products). The statements have no
           constants: what is returned are the bare expressions. Where they are below 4 N d, reading q, k, v and writing
           the output once needs more.
Tilings    counted tile by tile, every tile read once where it is used.
"""

import math


def io_bound(queries: float, keys: float, dim: int, cache: int) -> float:
    """Return the bare expression of the lower bound in words: min(N K d / sqrt(M), N K d^2 / M).

    Args:
        queries, keys: N queries and K keys that each of them sees, on average; the paper has N = K.
        dim: d, of a head.
        cache: M, in words.
    """
    pairs = queries * keys
    return min(pairs * dim / math.sqrt(cache), pairs * dim**2 / cache)


def least_traffic(queries: int, keys: int, dim: int) -> int:
    """Return the words of reading q, k, v and writing the output once."""
    return 2 * (queries + keys) * dim


def key_outer_traffic(tokens: int, dim: int, cache: int) -> int:
    """Return the words that the first FlashAttention moves: tiles of keys outside, of queries inside.

    2 N d for keys and values, and for each of ceil(N / Bc) key tiles, Bc = ceil(M / 4d): queries, outputs (read and
    written), and two statistics, read and written.
    """
    tile = -(-cache // (4 * dim))
    return 2 * tokens * dim + -(-tokens // tile) * tokens * (3 * dim + 4)


def query_outer_traffic(tokens: int, dim: int, cache: int) -> int:
    """Return the words of tiles of queries outside, of keys inside, as FlashAttention-2 and our kernels do.

    2 N d for queries and outputs, N statistics, and keys and values once per query tile of floor(M / 4d) tokens.
    """
    tile = cache // (4 * dim)
    return 2 * tokens * dim + tokens + -(-tokens // tile) * 2 * tokens * dim


def unfused_traffic(tokens: int, dim: int) -> int:
    """Return the words of three passes: logits and probabilities are written and read once, with ideal products."""
    return 4 * tokens * dim + 4 * tokens**2
