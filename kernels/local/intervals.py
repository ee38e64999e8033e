"""What local patterns see, on the GPU: one interval of tokens per axis (Triton helpers, no kernel of their own).

`AXIS` is a `plan.Axis`, a constant: `interval` and `tile_range` say for vectors what its methods say for numbers.
An owner is a query, or where AXIS.inverse a key; tokens are counted inside a dilation group.
"""

import triton
import triton.language as tl


@triton.jit
def interval(x, walked, AXIS: tl.constexpr):
    """The walked tokens [low, high) that owners `x` see."""
    SIZE: tl.constexpr = AXIS.keys
    REACH: tl.constexpr = AXIS.reach
    if AXIS.kind == "circle":
        low, high = tl.maximum(x - REACH, 0), tl.minimum(x + REACH + 1, walked)
    elif AXIS.is_window:
        low = (x - AXIS.origin) // SIZE * SIZE + AXIS.origin
        high = low + SIZE
    elif AXIS.kind == "block":
        if AXIS.inverse:
            BEHIND: tl.constexpr = REACH // SIZE + 1  # blocks: no division of a negative number
            low = ((x - REACH + BEHIND * SIZE) // SIZE - BEHIND) * AXIS.queries
            high = ((x + REACH) // SIZE + 1) * AXIS.queries
            low, high = tl.maximum(low, 0), tl.minimum(high, walked)
        else:
            low = x // AXIS.queries * SIZE - REACH
            high = low + SIZE + 2 * REACH
    else:
        STRIDE: tl.constexpr = AXIS.stride
        HALF: tl.constexpr = SIZE // 2 - STRIDE // 2
        if AXIS.causal:
            if AXIS.inverse:
                low, high = x, tl.where(x + SIZE >= walked, walked, (x + SIZE) // STRIDE * STRIDE)
            else:
                low = tl.maximum(tl.minimum(x // STRIDE * STRIDE + STRIDE, walked) - SIZE, 0)
                high = x + 1
        elif AXIS.inverse:
            low = tl.where(x < SIZE, 0, (x + HALF - SIZE + STRIDE) // STRIDE * STRIDE)
            high = tl.where(x >= walked - SIZE, walked, ((x + HALF) // STRIDE + 1) * STRIDE)
        else:
            low = tl.maximum(tl.minimum(x // STRIDE * STRIDE - HALF, walked - SIZE), 0)
            high = low + SIZE
    return low, high


@triton.jit
def tile_range(tile, owners, AXIS: tl.constexpr):
    """Where a tile starts and the range [low, high) that it owns; empty where the group is short."""
    block = AXIS.first + tile // AXIS.split * AXIS.step
    start = block + tile % AXIS.split * AXIS.tile
    high = tl.minimum(tl.minimum(start + AXIS.tile, block + AXIS.step), owners)
    return start, tl.maximum(start, 0), high


@triton.jit
def walked_range(low, high, walked, AXIS: tl.constexpr):
    """The walked tokens [begin, end) of a tile that owns [low, high), and how many walked tiles it visits."""
    begin, _ = interval(low, walked, AXIS)
    _, end = interval(high - 1, walked, AXIS)
    return begin, end, tl.cdiv(end - begin, AXIS.walk_step) * AXIS.walk_split


@triton.jit
def walk_offset(index, AXIS: tl.constexpr):
    return index // AXIS.walk_split * AXIS.walk_step + index % AXIS.walk_split * AXIS.walk


@triton.jit
def seen_word(x, walked, begin, AXIS: tl.constexpr):
    """Bit i of a word: owner `x` sees walked token begin + i. Where the bits are too few: the interval, unpacked."""
    low, high = interval(x, walked, AXIS)
    if AXIS.shift > 0:
        low, high = tl.maximum(low, 0), tl.minimum(high, walked)
    low, high = low - begin, high - begin
    if not AXIS.wide:
        one = tl.full(x.shape, 1, tl.int64)
        low = ((one << tl.maximum(high, 0)) - (one << tl.maximum(low, 0))).to(tl.int32)
    return low, high


@triton.jit
def tile_bits(word, high, index, AXIS: tl.constexpr):
    """Bit i: the owner sees token i of the walked tile `index`."""
    offset = walk_offset(index, AXIS)
    if AXIS.wide:
        ahead = tl.minimum(tl.maximum(word - offset, 0), AXIS.walk)
        past = tl.minimum(tl.maximum(high - offset, ahead), AXIS.walk)
        bits = (1 << past) - (1 << ahead)
    else:
        bits = (word >> offset) & ((1 << AXIS.walk) - 1)
    if AXIS.walk_split * AXIS.walk > AXIS.walk_step:  # the last tile of a block overhangs it
        bits = bits & ((1 << tl.minimum(AXIS.walk_step - index % AXIS.walk_split * AXIS.walk, AXIS.walk)) - 1)
    return bits


@triton.jit
def hidden(
    word_y, high_y, word_x, high_x, step_y, step_x, y, x, walk_y, walk_x, inside,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """[M, N] bool, True where owner m does not see walked token n: one AND of two words a logit.

    A circle compares dy * dy + dx * dx with radius * radius instead, the squares taken apart: two products a logit.

    Args:
        word_y, high_y, word_x, high_x: [M] from `own`.
        step_y, step_x: the walked tile.
        y, x: [M] owners. walk_y, walk_x, inside: [N] walked tokens, and whether they lie on the map.
    """
    if ROWS.kind == "circle":
        square = tl.where(inside, walk_y * walk_y + walk_x * walk_x, 1 << 30)  # past the map is past any radius
        apart = square[None, :] - (2 * y)[:, None] * walk_y[None, :] - (2 * x)[:, None] * walk_x[None, :]
        unseen = apart >= (ROWS.keys * ROWS.keys - y * y - x * x)[:, None]
    else:
        n = tl.arange(0, ROWS.walk * COLS.walk)
        cell = (1 << n // COLS.walk) | (1 << (ROWS.walk + n % COLS.walk))
        row_bits, col_bits = tile_bits(word_y, high_y, step_y, ROWS), tile_bits(word_x, high_x, step_x, COLS)
        outside = ~(row_bits | (col_bits << ROWS.walk))
        unseen = (outside[:, None] & cell[None, :]) != 0
    return unseen


@triton.jit
def locate(heads, tiles, dilation):
    """What this program owns: image, head, tiles, groups. Heads vary fastest: neighbors share cache lines."""
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    tile_x = pid % tiles[1]
    pid = pid // tiles[1]
    tile_y = pid % tiles[0]
    pid = pid // tiles[0]
    group_x = pid % dilation[1]
    pid = pid // dilation[1]
    return (pid // dilation[0]).to(tl.int64), head, tile_y, tile_x, pid % dilation[0], group_x


@triton.jit
def load_tokens(ptr, offsets, inside, DIM: tl.constexpr, PAD: tl.constexpr):
    """[tokens, PAD]: rows at `offsets`, zeros where not inside and past DIM."""
    d = tl.arange(0, PAD)
    mask = inside[:, None]
    if DIM != PAD:
        mask = mask & (d < DIM)[None, :]
    return tl.load(ptr + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(ptr, offsets, inside, tile, DIM: tl.constexpr, PAD: tl.constexpr):
    d = tl.arange(0, PAD)
    mask = inside[:, None]
    if DIM != PAD:
        mask = mask & (d < DIM)[None, :]
    tl.store(ptr + offsets[:, None] + d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def place_cells(place_y, place_x, PLACES: tl.constexpr, dtype: tl.constexpr):
    """[tokens, 2 * PLACES] of 0 and 1: a token's row of its window, then its column. Times logits: the token's own."""
    p = tl.arange(0, 2 * PLACES)[None, :]
    return tl.where((p == place_y[:, None]) | (p == PLACES + place_x[:, None]), 1.0, 0.0).to(dtype)


@triton.jit
def own(i, tile, group, dilation, owners, walked, AXIS: tl.constexpr):
    """One axis of an owner tile; `i` counts its tokens from 0.

    Returns:
        x, valid: the owners, moved onto the tile's own where not valid.
        begin, visits, end: the first walked token, the number of walked tiles, and the token past the last one that is
            on the map and that an owner sees: the rest of a tile is not loaded, so that its numbers reach no owner.
        word, high: for `tile_bits`.
    """
    owners = (owners - group + dilation - 1) // dilation
    walked = (walked - group + dilation - 1) // dilation
    start, first, past = tile_range(tile, owners, AXIS)
    x = start + i
    valid = (x >= first) & (x < past)
    x = tl.minimum(tl.maximum(x, first), past - 1)
    begin, end, visits = walked_range(first, past, walked, AXIS)
    visits = tl.where(first < past, visits, 0)
    word, high = seen_word(x, walked, begin, AXIS)
    return x, valid, begin, visits, tl.minimum(end, walked), word, high


@triton.jit
def walk(index, i, begin, end, AXIS: tl.constexpr):
    """One axis of the walked tile `index`: its tokens, and which of them lie on the map and before `end`."""
    x = begin + walk_offset(index, AXIS) + i
    return x, (x >= 0) & (x < end)


@triton.jit
def in_elements(strides, UNIT: tl.constexpr):
    """Strides that were passed in units of UNIT elements: the compiler then knows that UNIT divides them."""
    if UNIT == 1:
        return strides
    return strides[0] * UNIT, strides[1] * UNIT, strides[2] * UNIT, strides[3] * UNIT


@triton.jit
def map_offsets(y, x, group_y, group_x, dilation, strides):
    """Where tokens (ranks y, x of their groups) lie in one image, in elements."""
    return (group_y + y * dilation[0]) * strides[1] + (group_x + x * dilation[1]) * strides[2]


@triton.jit
def of_head(ptr, strides, image, head):
    """Where one head of one image begins; in int64, since a batch may pass 2 ** 31 elements."""
    return ptr + image * strides[0] + head * strides[3]
