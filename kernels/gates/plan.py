"""How the maps of the gates are cut into tiles. No Triton needed."""

from dataclasses import dataclass

from .._launch import LEAST_PROGRAMS, padded, power_of_2

TILE_VALUES = 4096  # of a tile of the channel gate or the strip gate
LEAST_CHUNK = 1024  # pixels that one program sums
MOST_COLUMNS = 256  # of a tile of the strip gate
SPAN = 5  # outputs of a row that a thread of a depthwise convolution keeps: maps of 56, 28 and 14 columns fill 93 %
TAPS = 7  # taps of a row whose gradients a thread keeps
DEPTHWISE_VALUES = 1024  # of a tile of a depthwise convolution: 8 for each of its 128 threads
TAPS_GRAD_PROGRAMS = 1024  # few enough partial sums of the taps


@dataclass(frozen=True)
class ChannelGateTiles:
    """How a map is cut: channels and pixels of a tile, and the pixels that one program sums."""

    channels: int
    pixels: int
    chunk: int
    chunks: int


def channel_gate_tiles(batch: int, channels: int, pixels: int, channels_last: bool) -> ChannelGateTiles:
    """Tiles of TILE_VALUES values, long in the direction in which memory runs."""
    if channels_last:
        block_c = min(power_of_2(channels), 128)
        block_p = min(power_of_2(pixels), TILE_VALUES // block_c)
    else:
        block_p = min(power_of_2(pixels), 1024)
        block_c = min(power_of_2(channels), TILE_VALUES // block_p)
    wanted = max(1, min(LEAST_PROGRAMS // (batch * -(-channels // block_c)), pixels // LEAST_CHUNK))
    chunk = -(-pixels // (wanted * block_p)) * block_p
    return ChannelGateTiles(block_c, block_p, chunk, -(-pixels // chunk))


def strip_gate_tiles(channels: int, height: int, width: int, channels_last: bool) -> tuple[int, int, int]:
    """(channels, rows, columns) of a tile of at most `TILE_VALUES`, long in the direction in which memory runs."""
    block_w = min(power_of_2(width), MOST_COLUMNS)
    block_c = min(power_of_2(channels), 64 if channels_last else 1, TILE_VALUES // block_w)
    block_h = min(power_of_2(height), TILE_VALUES // (block_w * block_c))
    if not channels_last:  # small planes: as many as fill the tile
        block_c = min(power_of_2(channels), TILE_VALUES // (block_w * block_h))
    return block_c, block_h, block_w


def large_kernel_tiles(channels: int, itemsize: int, grad: bool = False) -> tuple[int, int, int, int]:
    """(pixels, channels of a step, channels, warps) of a tile; at most 64 accumulators a thread, 32 in fp32.

    The gradient's kernel (`grad`) keeps three tiles; with many channels its threads hold 32 accumulators too.
    """
    block_n = padded(channels)
    wide = itemsize == 4 or (grad and block_n > 128)
    block_p = max(16, min(64, 2 ** (13 if wide else 14) // block_n))
    warps = 4 if block_n <= 64 else 16 if wide and block_n > 512 else 8
    return block_p, min(block_n, 16 if itemsize == 4 and block_n >= 512 else 32), block_n, warps


def depthwise_tiles(channels: int) -> tuple[int, int, int]:
    """(spans, channels, warps) of a tile of a depthwise convolution; as many channels as leave few threads idle."""
    block_c = 64 if channels % 64 == 0 else min(power_of_2(channels, 8), 32)
    return DEPTHWISE_VALUES // block_c, block_c, 4


def taps_grad_tiles(runs: int, channels: int) -> tuple[int, int]:
    """(programs, tiles of runs that one of them sums), for each tile of channels."""
    block_r, block_c, _ = depthwise_tiles(channels)
    tiles = -(-runs // block_r)
    turns = max(tiles * -(-channels // block_c) // TAPS_GRAD_PROGRAMS, 1)
    return -(-tiles // turns), turns
