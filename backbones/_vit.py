"""timm's VisionTransformer with blocks of ours, images of any size and the errors of our own backbones.

Keys and layers are timm's. Images are padded to whole patches; position embeddings are resampled for every other size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.models import checkpoint, register_notrace_function, register_notrace_module
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, fx, nn

from ..attention_ops.positions import resample_table
from ..attention_ops.tiling import map_size
from ._build import M, StateDict, build, last_three
from ._layers import pad_to_multiples, to_nchw, to_nhwc
from ._pruning import Prunable
from ._staged import check_indices, take_image, take_maps

fx.wrap("take_image")
fx.wrap("resample_table")
fx.wrap("map_size")
register_notrace_function(resample_table)
register_notrace_function(map_size)

OUTPUT_FORMATS = ("NCHW", "NLC")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a plain vision transformer. A family's config gives its defaults and adds its own fields."""

    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    patch_size: int = 16  # px
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads {self.num_heads}, got {self.embed_dim}")
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")

    def grid(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        """Return (rows, columns) of the patches of an image."""
        rows, cols = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(rows, cols) < self.patch_size:
            raise ValueError(f"img_size must be at least the patch, {self.patch_size} px, got {img_size}")
        return rows // self.patch_size, cols // self.patch_size


@register_notrace_module
class PaddedPatchEmbed(PatchEmbed):
    """timm's PatchEmbed; zeros on the right and at the bottom complete the last patches."""

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, h, w, C)  # type: ignore[override]
        return self.norm(to_nhwc(self.proj(pad_to_multiples(x, self.patch_size[0]))))


class ViTBlock(nn.Module):
    """timm's pre-norm block around any attention: names of layers are timm's.

    Args:
        attention: (B, N, C) -> (B, N, C).
        dim: channels.
        mlp_ratio: hidden channels of the MLP, as a share of dim.
        init_values: of layer scale; None: there is none.
        proj_drop, drop_path: rates.
    """

    def __init__(
        self,
        attention: nn.Module,
        dim: int,
        mlp_ratio: float,
        *,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = attention
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


MakeBlock = Callable[..., nn.Module]  # (index, proj_drop=, drop_path=, device=, dtype=) -> a block


class CheckedViT(VisionTransformer):
    """Base of plain vision transformers. A family gives the function that makes its blocks.

    Where blocks take or return more than tokens, a family overrides `start`, `step`, `tokens` and `finish`, and
    `forward_features` for TorchScript.

    Args:
        config: sizes.
        make_block: makes block number `index`.
        img_size: of the position embeddings, px; other sizes resample them.
        num_classes, in_chans, global_pool, drop_rate, pos_drop_rate: as in timm.
        proj_drop_rate: dropout inside blocks.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        class_token, positions: whether there are any.
        patch_norm: a LayerNorm on patches, before class token and positions.
        fc_norm: the last norm comes after pooling; None: where tokens are averaged, as in timm.
    """

    prunable = Prunable(
        qkv=r"blocks\.\d+\.attn\.qkv\.weight",
        prj=r"blocks\.\d+\.attn\.proj\.weight",
        mlp=r"blocks\.\d+\.mlp\.fc[12]\.weight",
    )

    def __init__(
        self,
        config: ViTConfig,
        make_block: MakeBlock,
        *,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: Any = "token",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        class_token: bool = True,
        positions: bool = True,
        patch_norm: bool = False,
        fc_norm: bool | None = None,
        device=None,
        dtype=None,
    ) -> None:
        grid = config.grid(img_size)  # refuses an image smaller than a patch

        def block_fn(*, depth: int, proj_drop: float, drop_path: float, device, dtype, **_: Any) -> nn.Module:
            return make_block(depth, proj_drop=proj_drop, drop_path=drop_path, device=device, dtype=dtype)

        super().__init__(
            img_size=img_size, patch_size=config.patch_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, embed_dim=config.embed_dim, depth=config.depth, num_heads=config.num_heads,
            class_token=class_token, pos_embed="learn" if positions else "none", fc_norm=fc_norm, dynamic_img_size=True,
            drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate, embed_layer=PaddedPatchEmbed,
            embed_norm_layer=LayerNorm if patch_norm else None,
            block_fn=block_fn,  # type: ignore[arg-type]  # timm calls it, as it calls a class
            device=device, dtype=dtype,
        )  # fmt: skip
        self.stride_px, self.table_size = config.patch_size, grid
        # a Sequential cannot give them the map's size
        self.blocks = nn.ModuleList(self.blocks)  # type: ignore[assignment]

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, C, H, W) -> tokens (B, prefix + N, C), and (rows, columns) of the map."""
        x = self.patch_embed(take_image(x, self.stride_px))
        size = map_size(x)
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + resample_table(self.pos_embed[0], size, self.table_size, self.num_prefix_tokens)
        return self.norm_pre(self.patch_drop(self.pos_drop(x))), size

    # What a family overrides

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the first block takes."""
        return (x,)

    def step(self, block: nn.Module, state: tuple[Tensor, ...], size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Run a block on what it takes; return what the next one takes."""
        return (self.call(block, *state),)

    def tokens(self, state: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
        """Return all tokens between two blocks, (B, prefix + N, C)."""
        return state[0]

    def finish(self, state: tuple[Tensor, ...]) -> Tensor:
        """Return the features after the last block."""
        return self.norm(state[0])

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the tokens after the norm, unpooled."""
        x, size = self.embed(x)
        if torch.jit.is_scripting():
            for block in self.blocks:
                x = block(x)
            return self.norm(x)
        else:
            return self.finish(self.last_state(x, size))

    # Common to all

    def call(self, block: nn.Module, *state: Tensor, **options: Any) -> Any:
        """Call a block; under gradient checkpointing, keep only its inputs."""
        return checkpoint(block, *state, **options) if self.grad_checkpointing else block(*state, **options)

    @torch.jit.ignore
    def states(self, x: Tensor, size: tuple[int, int], blocks: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield what is between blocks, after each of the first `blocks`."""
        state = self.start(x)
        for block in list(self.blocks)[:blocks]:
            state = self.step(block, state, size)
            yield state

    @torch.jit.ignore
    def last_state(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        state = self.start(x)
        for block in self.blocks:
            state = self.step(block, state, size)
        return state

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As timm's."""
        super().set_input_size(img_size, patch_size)
        self.table_size = (self.patch_embed.grid_size[0], self.patch_embed.grid_size[1])

    # timm's contract

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last features and the maps after the chosen blocks.

        Args:
            x: images (B, C, H, W).
            indices: the last n blocks if an int, those blocks if a sequence, all if None.
            return_prefix_tokens: return pairs (map, prefix tokens) in place of maps.
            norm: apply the final norm to the maps.
            stop_early: run no block past the last one asked for.
            output_fmt: "NCHW", or "NLC" for (B, N, C).
            intermediates_only: leave the last features out of the answer.

        Raises:
            ValueError: the images are too small, the model has no such block, or an unknown output_fmt.
        """
        if output_fmt not in OUTPUT_FORMATS:
            raise ValueError(f"forward_intermediates: output_fmt must be one of {OUTPUT_FORMATS}, got {output_fmt!r}")
        take, last = take_maps(len(self.blocks), indices)
        x, size = self.embed(x)
        state, maps = self.start(x), []
        for i, state in enumerate(self.states(x, size, last + 1 if stop_early else len(self.blocks))):
            if i in take:
                tokens = self.tokens(state, size)
                maps.append(self._as_map(self.norm(tokens) if norm else tokens, size, output_fmt, return_prefix_tokens))
        return maps if intermediates_only else (self.finish(state), maps)

    def _as_map(self, x: Tensor, size: tuple[int, int], output_fmt: str, with_prefix: bool) -> Any:
        prefix, x = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        if output_fmt == "NCHW":
            x = to_nchw(x.unflatten(1, size)).contiguous()
        return (x, prefix) if with_prefix else x

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's.

        Raises:
            ValueError: the model has no such block.
        """
        check_indices("indices", indices, len(self.blocks))
        chosen = indices if isinstance(indices, int) else list(indices)
        return super().prune_intermediate_layers(chosen, prune_norm, prune_head)


def build_vit(
    make: Callable[..., M], config: ViTConfig, variant: str, pretrained: bool, filter_fn: Callable, **kwargs: Any
) -> M:
    """Build a variant as `build` does; its default features are the last three maps, since all have one size."""
    arguments = {"out_indices": last_three(kwargs.get("depth", config.depth)), **kwargs}
    return build(make, config, variant, pretrained, filter_fn, **arguments)


def at_the_models_size(state_dict: StateDict, model: Any) -> StateDict:
    """Return the state dict with position embeddings of the model's size."""
    if "pos_embed" not in state_dict or getattr(model, "pos_embed", None) is None:
        return dict(state_dict)
    grid = (model.patch_embed.grid_size[0], model.patch_embed.grid_size[1])
    table = resized_positions(state_dict["pos_embed"], model.pos_embed, grid, model.num_prefix_tokens)
    return {**state_dict, "pos_embed": table}


def with_own(state_dict: StateDict, model: nn.Module, part: str) -> StateDict:
    """Add the model's own parameters whose names contain `part`, if the state dict has none of them."""
    if any(part in key for key in state_dict):
        return state_dict
    return state_dict | {key: value for key, value in model.state_dict().items() if part in key}


def resized_positions(table: Tensor, like: Tensor, grid: tuple[int, int], prefix_tokens: int) -> Tensor:
    """Return a table of a checkpoint, (1, tokens, C), for a model with another grid; unchanged where it fits.

    Raises:
        ValueError: the table is of no square map.
    """
    if table.dim() != 3 or table.shape[1] == like.shape[1] or table.shape[2] != like.shape[2]:
        return table
    tokens = table.shape[1] - prefix_tokens
    side = int(tokens**0.5)
    if side * side != tokens:
        raise ValueError(
            f"pos_embed of the checkpoint has {tokens} tokens, which are no square map, and the model has {grid}: "
            "build the model with the img_size of the checkpoint"
        )
    return resample_table(table[0], grid, (side, side), prefix_tokens)[None]


def put_back(x: Tensor, size: tuple[int, int], numbers: Tensor, prefix_tokens: int) -> Tensor:
    """Put tokens where they were: (B, prefix + count, C) -> (B, prefix + N, C), zeros where tokens were dropped.

    Args:
        numbers: (B, count), of the tokens on a map of `size`.
    """
    prefix, kept = x[:, :prefix_tokens], x[:, prefix_tokens:]
    whole = kept.new_zeros(kept.shape[0], size[0] * size[1], kept.shape[2])
    return torch.cat([prefix, whole.scatter(1, numbers[..., None].expand(-1, -1, kept.shape[2]), kept)], dim=1)
