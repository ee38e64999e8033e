"""How the maps of the gates are cut into tiles. No Triton needed."""

from dataclasses import dataclass

from .._launch import LEAST_PROGRAMS, padded, power_of_2

TILE_VALUES = 4096  # of a tile of the channel gate or the strip gate
LEAST_CHUNK = 1024  # pixels that one program sums
MOST_COLUMNS = 256  # of a tile of the strip gate


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


def large_kernel_tiles(channels: int, itemsize: int) -> tuple[int, int, int, int]:
    """(pixels, channels of a step, channels, warps) of a tile; at most 64 accumulators a thread, 32 in fp32."""
    block_n, wide = padded(channels), itemsize == 4
    block_p = max(16, min(64, 2 ** (13 if wide else 14) // block_n))
    warps = 4 if block_n <= 64 else 16 if wide and block_n > 512 else 8
    return block_p, min(block_n, 16 if wide and block_n >= 512 else 32), block_n, warps
