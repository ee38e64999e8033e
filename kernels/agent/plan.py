"""How agent attention is cut: blocks of agents, tiles of tokens, splits of long sums. No Triton needed."""

from dataclasses import dataclass

from torch import Tensor

from .._launch import LEAST_PROGRAMS, MOST_HEAD_DIM, dot_precision, padded

LEAST_ONE_PASS = LEAST_PROGRAMS // 2  # heads of all images with which one program a head fills a GPU (estimated)
FEW_TOKENS = 256  # that one program reads in a few tiles, however few heads there are
LEAST_CHUNK = 256  # tokens of a split; below, its partial sum costs as much as its reads


@dataclass(frozen=True)
class Plan:
    """How one call is cut; sizes in agents or tokens."""

    images: int
    heads: int
    agents: int
    queries: int
    keys: int
    block: int  # agents that one program holds, a power of two
    tile: int  # tokens of a tile
    back_block: int  # the same in the backward pass, which holds more
    back_tile: int

    @property
    def blocks(self) -> int:
        """Blocks of agents."""
        return -(-self.agents // self.block)

    @property
    def back_blocks(self) -> int:
        """Blocks of agents in the backward pass."""
        return -(-self.agents // self.back_block)

    @property
    def one_pass(self) -> bool:
        """Whether one program gathers for a head and reads for it: agents and gathered values never leave the chip."""
        few = max(self.queries, self.keys) <= FEW_TOKENS
        return self.blocks == 1 and (few or self.images * self.heads >= LEAST_ONE_PASS)

    def splits(self, tokens: int) -> tuple[int, int]:
        """Splits of a sum over tokens in each block of each head, and the tokens of one; none is empty."""
        wanted = -(-LEAST_PROGRAMS // (self.images * self.heads * self.blocks))
        splits = max(min(wanted, tokens // LEAST_CHUNK), 1)
        tile = max(self.tile, self.back_tile)
        chunk = -(-tokens // (splits * tile)) * tile
        return -(-tokens // chunk), chunk

    def shares(self, tokens: int) -> int:
        """Programs that share the images of a tile in the gradient of a bias."""
        programs = self.heads * self.back_blocks * -(-tokens // self.back_tile)
        return min(self.images, -(-LEAST_PROGRAMS // programs))


def make_plan(q: Tensor, k: Tensor, agents: Tensor) -> Plan:
    """Plan a call: q (B, Nq, heads, D), k (B, Nk, heads, D), agents (B, n, heads, D)."""
    images, queries, heads, dim = q.shape
    return Plan(images, heads, agents.shape[1], queries, k.shape[1], *blocks_of(agents.shape[1], dim, q.element_size()))


def blocks_of(agents: int, dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """(agents of a block, tokens of a tile, both again for the backward pass) without spills on sm_80 and sm_90.

    The backward pass holds two sums of block x head_dim in fp32, and two tiles of logits. A block of 128 saves the
    second pass over tokens where it holds all agents; more agents are taken in blocks of 64.
    """
    wide = padded(dim)
    if itemsize == 4:  # three TF32 products a product
        block = min(padded(agents), 32 if wide <= 64 else 16)
        return block, 32, block, 16
    back = min(padded(agents), 64)
    block = 128 if 64 < agents <= 128 and wide <= 64 else back
    return block, 64 if block < 128 else 32, back, 64 if back * wide <= 1024 else 32


def part_of(x: Tensor) -> int:
    """Channels that the gradient of a bias takes at a time: the registers hold three TF32 products of no more."""
    return min(padded(x.shape[-1]), 32 if x.element_size() == 4 else MOST_HEAD_DIM)


def constants(q: Tensor, plan: Plan, back: bool = False) -> dict[str, int | str | bool]:
    """What every kernel takes at compile time; `back`: of the backward pass."""
    block = plan.back_block if back else plan.block
    size = block * padded(q.shape[-1])
    many = size >= (4096 if back else 8192) or (back and q.element_size() == 4 and padded(q.shape[-1]) > 64)
    return {
        "DIM": q.shape[-1],
        "PAD": padded(q.shape[-1]),
        "BLOCK": block,
        "TILE": plan.back_tile if back else plan.tile,
        "PRECISION": dot_precision(q.dtype),
        "num_warps": 8 if many else 4,
        "enable_fp_fusion": True,
    }
