"""DependencyViT: tokens send messages to their parents, by reversed attention; unimportant tokens can be dropped.

Paper      Ding et al. 2023, arXiv:2304.03282.
Status     second-hand: the authors' repository (dingmyu/DependencyViT) holds a license and no code. This follows
           huggingface/pytorch-image-models pull request 2062, whose author reached about 73 top-1 with the tiny model,
           about 2 points below the paper, and writes that the real model needs further deviations. Treat accuracies of
           the paper as not reproduced.
Open       the position encoding is that request's guess: a depthwise 3x3 convolution with a shortcut after the first
           `cpe_depth` blocks, optionally with learned positions. The hidden width of the message controller is dim // 2
           there; with dim the parameter counts would be those of the paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops.reversed import MessageAttention
from ..attention_ops.sparsified import keep_tokens, take_tokens
from ._build import StateDict, cfg, check_fits
from ._layers import to_nchw, to_nhwc
from ._pruning import AttentionLayout, Prunable
from ._vit import CheckedViT, ViTBlock, ViTConfig, at_the_models_size, build_vit, put_back

register_notrace_module(MessageAttention)
LITE_BLOCKS = (1, 4, 7, 10)  # that drop tokens, counted from 0


@dataclass(frozen=True)
class DependencyViTConfig(ViTConfig):
    """What makes one variant differ from another."""

    embed_dim: int = 192
    num_heads: int = 12
    qkv_bias: bool = False
    cpe_depth: int = 1  # blocks that a convolution of positions follows
    learned_pos: bool = False  # position embeddings too
    layer_scale: float = 1e-6  # initial value
    pruning_blocks: tuple[int, ...] = ()  # that drop tokens after their attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.cpe_depth <= self.depth:
            raise ValueError(f"cpe_depth must be 0 to depth {self.depth}, got {self.cpe_depth}")
        if self.pruning_blocks and self.cpe_depth > min(self.pruning_blocks):
            raise ValueError(
                f"cpe_depth must be at most {min(self.pruning_blocks)} where block {min(self.pruning_blocks)} drops "
                f"tokens, since a convolution needs the whole map, got {self.cpe_depth}"
            )


def tokens_left(count: int, step: int) -> int:
    """Return how many of `count` tokens the pruning block number `step` (from 1) keeps: 16 % of all go at each."""
    percent = 16
    return max(count * (100 - percent * step) // (100 - percent * (step - 1)), 1)


@register_notrace_module
class PositionConv(nn.Module):
    """Conditional position encoding: a depthwise 3x3 convolution of the map, and a shortcut."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, N, C)
        return x + to_nhwc(self.proj(to_nchw(x.unflatten(1, [size[0], size[1]])))).flatten(1, 2)


class DependencyBlock(ViTBlock):
    """A block of reversed attention. It takes and returns tokens, (B, N, C), and m, (B, N): what messages are worth."""

    drops: Final[bool]
    encodes: Final[bool]

    def __init__(self, encodes: bool, attention: MessageAttention, dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(attention, dim, *args, **kwargs)
        self.drops, self.encodes = False, encodes
        dd = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.peg = PositionConv(dim, **dd) if encodes else None

    def forward(self, x: Tensor, m: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        sent = self.attn(self.norm1(x), m)
        x = x + self.drop_path1(self.ls1(sent[0]))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if self.encodes:
            x = self.peg(x, size=size)  # type: ignore[misc]
        return x, sent[1]


@register_notrace_module
class DroppingBlock(ViTBlock):
    """A block that drops the tokens of least worth after its attention.

    It returns tokens and m as the others do, and which of its tokens are left, (B, count).
    """

    drops: Final[bool]

    def __init__(self, step: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drops, self.pruning_step = True, step

    def forward(self, x: Tensor, m: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """`size` is not read: the other blocks' call."""
        out, m = self.attn(self.norm1(x), m)
        x = x + self.drop_path1(self.ls1(out))
        chosen = keep_tokens(m.detach(), tokens_left(m.shape[1], self.pruning_step))
        x, m = take_tokens(x, chosen), m.gather(1, chosen)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), m, chosen


def _make_block(index: int, *, config: DependencyViTConfig, proj_drop: float, drop_path: float, **dd) -> ViTBlock:
    attention = MessageAttention(
        config.embed_dim, config.num_heads, qkv_bias=config.qkv_bias, proj_drop=proj_drop, **dd
    )
    options = {"init_values": config.layer_scale, "proj_drop": proj_drop, "drop_path": drop_path, **dd}
    if index in config.pruning_blocks:
        step = config.pruning_blocks.index(index) + 1
        return DroppingBlock(step, attention, config.embed_dim, config.mlp_ratio, **options)
    return DependencyBlock(index < config.cpe_depth, attention, config.embed_dim, config.mlp_ratio, **options)


class DependencyViT(CheckedViT):
    """ViT of reversed attention, without class token; tokens are pooled with their worth m as weight.

    Args:
        config: sizes, positions, pruning.
        kwargs: as in `CheckedViT`; `global_pool` is "avg", "avgmax", "max" or "".
    """

    prunable = Prunable(
        qkv=r"blocks\.\d+\.attn\.qkv\.weight",
        prj=r"blocks\.\d+\.attn\.proj\.weight",
        mlp=r"blocks\.\d+\.mlp\.fc[12]\.weight",
        depthwise=r"blocks\.\d+\.peg\.proj\.weight",
        gate=r"blocks\.\d+\.attn\.(head_selector|message_controller\.fc[12])\.weight",
        attentions=(
            AttentionLayout(r"blocks\.\d+\.attn", heads="num_heads", cuts_heads=False),  # a softmax over the heads
        ),
    )

    def __init__(self, config: DependencyViTConfig, global_pool: Any = "avg", **kwargs: Any) -> None:
        super().__init__(
            config,
            partial(_make_block, config=config),
            global_pool=global_pool,
            class_token=False,
            positions=config.learned_pos,
            fc_norm=False,
            **kwargs,
        )

    # States between blocks: tokens, m, and the numbers of the tokens on the map

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        numbers = torch.arange(x.shape[1], device=x.device)
        return x, x.new_ones(x.shape[0], x.shape[1]), numbers.expand(x.shape[0], -1)

    def step(self, block: nn.Module, state: tuple[Tensor, ...], size: tuple[int, int]) -> tuple[Tensor, ...]:
        *tokens, numbers = state
        out = self.call(block, *tokens, size=size)
        dropped = isinstance(out, tuple) and len(out) == 3
        return out[0], out[1], numbers.gather(1, out[2]) if dropped else numbers

    def tokens(self, state: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
        return put_back(state[0], size, state[2], 0)

    def finish(self, state: tuple[Tensor, ...]) -> Tensor:
        return self.norm(state[0]) * state[1][..., None]

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the tokens that are left, after the norm, times their worth; unpooled."""
        x, size = self.embed(x)
        if torch.jit.is_scripting():
            m = torch.ones([x.shape[0], x.shape[1]], device=x.device, dtype=x.dtype)
            for block in self.blocks:
                if block.drops:
                    x, m, _ = block(x, m, size)
                else:
                    x, m = block(x, m, size)
            return self.norm(x) * m[..., None]
        else:
            return self.finish(self.last_state(x, size))


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Take weights of this model, in the keys of the pull request.

    Learned positions of another image size are resampled.

    Raises:
        ValueError: the weights are another model's.
    """
    return check_fits(at_the_models_size(unwrap(checkpoint), model), model)


DEPENDENCY: dict[str, Any] = {
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "pool_size": None,
    "paper_ids": "arXiv:2304.03282",
    "paper_name": "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
    "origin_url": "https://github.com/huggingface/pytorch-image-models/pull/2062",
    "notes": ("Second-hand: the authors published no code; the accuracy of the paper was not reached with this form.",),
}
default_cfgs = generate_default_cfgs(
    {f"dependencyvit_{name}.untrained": cfg(**DEPENDENCY) for name in ("tiny", "small", "lite_tiny", "lite_small")}
)
TINY = DependencyViTConfig()
SMALL = replace(TINY, embed_dim=384)


def _create(variant: str, config: DependencyViTConfig, pretrained: bool, **kwargs) -> DependencyViT:
    return build_vit(DependencyViT, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def dependencyvit_tiny(pretrained: bool = False, **kwargs) -> DependencyViT:
    """DependencyViT-T, second-hand (see the module's text), 5.9 M parameters, 1.3 GMACs at 224."""
    return _create("dependencyvit_tiny", TINY, pretrained, **kwargs)


@register_model
def dependencyvit_small(pretrained: bool = False, **kwargs) -> DependencyViT:
    """DependencyViT-S, second-hand (see the module's text), 22.9 M parameters, 4.8 GMACs at 224."""
    return _create("dependencyvit_small", SMALL, pretrained, **kwargs)


@register_model
def dependencyvit_lite_tiny(pretrained: bool = False, **kwargs) -> DependencyViT:
    """DependencyViT-Lite-T, second-hand: drops 16 % of all tokens at four blocks; 5.9 M parameters, 0.85 GMACs."""
    return _create("dependencyvit_lite_tiny", replace(TINY, pruning_blocks=LITE_BLOCKS), pretrained, **kwargs)


@register_model
def dependencyvit_lite_small(pretrained: bool = False, **kwargs) -> DependencyViT:
    """DependencyViT-Lite-S, second-hand: drops 16 % of all tokens at four blocks; 22.9 M parameters."""
    return _create("dependencyvit_lite_small", replace(SMALL, pruning_blocks=LITE_BLOCKS), pretrained, **kwargs)
