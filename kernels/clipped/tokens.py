"""Tokens of a window, and which pairs of them are seen (Triton helpers, no kernel of their own).

`PLACE` is a tuple of numbers: rows and columns of a window, where the first window begins (before the map where windows
are shifted), rows and columns of the map. All tokens of a sequence are one window of one row.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1.0e30)  # finite, not -inf: a query may see no key of a whole tile, and inf - inf is NaN


@triton.jit
def locate(heads, windows, tiles):
    """What this program owns: image, head, window (row, column), tile of the window's tokens. Heads vary fastest."""
    pid = tl.program_id(0)
    head, pid = pid % heads, pid // heads
    tile, pid = pid % tiles, pid // tiles
    window_x, pid = pid % windows[1], pid // windows[1]
    return (pid // windows[0]).to(tl.int64), head, pid % windows[0], window_x, tile


@triton.jit
def find(t, window_y, window_x, PLACE, strides):
    """Where tokens `t` of a window lie in one image: element offsets, numbers on the map, and which are on the map."""
    y = PLACE[2] + window_y * PLACE[0] + t // PLACE[1]
    x = PLACE[3] + window_x * PLACE[1] + t % PLACE[1]
    inside = (t < PLACE[0] * PLACE[1]) & (y >= 0) & (y < PLACE[4]) & (x >= 0) & (x < PLACE[5])
    return y * strides[1] + x * strides[2], y * PLACE[5] + x, inside


@triton.jit
def load(ptr, offs, inside, DIM: tl.constexpr, PAD: tl.constexpr):
    """[tokens, PAD]: rows at `offs`, zeros where not inside and past DIM."""
    d = tl.arange(0, PAD)
    return tl.load(ptr + offs[:, None] + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def store(ptr, offs, inside, tile, DIM: tl.constexpr, PAD: tl.constexpr):
    d = tl.arange(0, PAD)
    mask = inside[:, None] & (d < DIM)[None, :]
    tl.store(ptr + offs[:, None] + d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def pairs(q_inside, k_inside, m, n, bits_ptr, bits_row, HAS_BITS: tl.constexpr):
    """[M, N] bool, True where query m sees key n; with bits, key n is bit n % 32 of word n // 32 of a query's row."""
    seen = q_inside[:, None] & k_inside[None, :]
    if HAS_BITS:
        words = tl.load(bits_ptr + m[:, None] * bits_row + (n // 32)[None, :], mask=seen, other=0)
        seen = seen & (((words >> (n % 32)[None, :]) & 1) != 0)
    return seen


@triton.jit
def clip(probs, gamma, stretch, CLIP: tl.constexpr):
    """Clipped probabilities; the probabilities themselves where nothing is clipped."""
    if CLIP:
        probs = probs * stretch + gamma
        probs = tl.where(probs < 0.0, 0.0, tl.where(probs > 1.0, 1.0, probs))  # NaN stays, unlike in min and max
    return probs


@triton.jit
def clip_grad(probs, grad, gamma, stretch, CLIP: tl.constexpr):
    """The gradient of probabilities, from that of clipped ones."""
    if CLIP:
        stretched = probs * stretch + gamma
        grad = tl.where((stretched < 0.0) | (stretched > 1.0), 0.0, grad * stretch)
    return grad
