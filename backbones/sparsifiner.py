"""Sparsifiner: DeiT whose tokens attend to the keys that a small predictor chooses for every image.

Paper      Wei, Duggal, Lin, Liu, Urtasun 2023, arXiv:2303.13755.
Official   https://github.com/lim142857/Sparsifiner (MIT); its keys are ours. No weights are published. DeiT's weights
           load; the predictors then keep their first values, which phase 1 trains.
Phases     1: predictors learn to approximate the attention matrices of a dense teacher, `reconstruction_loss`.
           2: the backbone is fine-tuned with the choices of frozen predictors, `distillation_loss`.
Pruning    with token_rate, blocks 3, 6 and 9 drop tokens by the attention of the class token, and later blocks run on
           the others alone. The authors keep dropped tokens as zeros: the logits are the same.
We differ  other image sizes than img_size resample positions and the predictors' tables; the authors' model takes one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops.sparsified import (
    MaskPredictor,
    SparsifiedAttention,
    keep_tokens,
    share_of,
    share_of_kept,
    take_tokens,
)
from ._build import StateDict, cfg, check_fits
from ._pruning import AttentionLayout, Prunable
from ._vit import CheckedViT, ViTBlock, ViTConfig, at_the_models_size, build_vit, put_back, with_own

register_notrace_module(SparsifiedAttention)
PRUNING_BLOCKS = (3, 6, 9)


@dataclass(frozen=True)
class SparsifinerConfig(ViTConfig):
    """What makes one variant differ from another."""

    keep: float = 0.25  # share of the keys that a query sees
    token_rate: float | None = None  # share of the tokens that each of the pruning blocks keeps; None: all stay
    pruning_blocks: tuple[int, ...] = PRUNING_BLOCKS  # that drop tokens, counted from 0
    top: int | None = 8  # basis coefficients of a query; None: those above 0.05
    shares_tables: bool = False  # one table to and from the basis

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, share in (("keep", self.keep), ("token_rate", self.token_rate)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {share!r}")

    def kept(self, index: int) -> float:
        """Return the share of an image's tokens that is left behind block `index`."""
        pruned = sum(block <= index for block in self.pruning_blocks)
        return 1.0 if self.token_rate is None else self.token_rate**pruned


class SparsifiedBlock(ViTBlock):
    """A block of sparsified attention, on all tokens of a map."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]  # (B, 1 + N, C)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), size=size)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@register_notrace_module
class PruningBlock(ViTBlock):
    """A block that runs on the tokens that are left, and may drop some after its attention.

    Args:
        kept: share of all tokens of the map that is left behind this block.
        drops: whether this block drops any.
        args, kwargs: as in `ViTBlock`.
    """

    drops: Final[bool]

    def __init__(self, kept: float, drops: bool, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept, self.drops = kept, drops

    def forward(self, x: Tensor, numbers: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, 1 + count, C) and its tokens' numbers on the map, (B, count) -> both, of the tokens that are left."""
        q, k, v = self.attn.project(self.norm1(x))  # type: ignore[operator]
        count, dropped = numbers.shape[1], size[0] * size[1] - numbers.shape[1]
        budget = share_of(1 + size[0] * size[1], self.attn.keep)  # type: ignore[arg-type]
        budget = min(budget, count) if dropped > 0 else budget
        out = self.attn.attend(q, k, v, budget, size, numbers, dropped)  # type: ignore[operator]
        x = x + self.drop_path1(self.ls1(out))
        if self.drops:
            scores = class_scores(q[:, :1], k, self.attn.scale, dropped)  # type: ignore[arg-type]
            chosen = keep_tokens(scores, share_of(size[0] * size[1], self.kept))
            numbers = numbers.gather(1, chosen)
            x = torch.cat([x[:, :1], take_tokens(x[:, 1:], chosen)], dim=1)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), numbers


def class_scores(q: Tensor, k: Tensor, scale: float, dropped: int) -> Tensor:
    """Return the attention of the class token to every other token, mean over heads: (B, N).

    Args:
        q: (B, 1, heads, head_dim) of the class token; k: (B, 1 + N, heads, head_dim).
        dropped: tokens that were dropped before, which the class token sees as keys of zero.
    """
    probs = (torch.einsum("bqhd,bnhd->bqhn", q, k) * scale).softmax(-1)
    if dropped > 0:
        probs = probs * share_of_kept(q, k, scale, dropped)[..., None]
    return probs.mean(2)[:, 0, 1:].detach()


def _make_block(
    index: int, *, config: SparsifinerConfig, grid: tuple[int, int], proj_drop: float, drop_path: float, **dd
) -> ViTBlock:
    attention = SparsifiedAttention(
        config.embed_dim,
        config.num_heads,
        map_size=grid,
        prefix_tokens=1,
        qkv_bias=config.qkv_bias,
        keep=config.keep,
        shares_tables=config.shares_tables,
        top=config.top,
        proj_drop=proj_drop,
        **dd,
    )
    rates = {"proj_drop": proj_drop, "drop_path": drop_path}
    if config.token_rate is None:
        return SparsifiedBlock(attention, config.embed_dim, config.mlp_ratio, **rates, **dd)
    kept, drops = config.kept(index), index in config.pruning_blocks
    return PruningBlock(kept, drops, attention, config.embed_dim, config.mlp_ratio, **rates, **dd)


class Sparsifiner(CheckedViT):
    """DeiT with a mask predictor in every attention.

    Args:
        config: sizes, budgets.
        img_size: px, for which positions and the predictors' tables are made.
        kwargs: as in `CheckedViT`.
    """

    prunes: Final[bool]
    prunable = Prunable(
        qkv=r"blocks\.\d+\.attn\.qkv\.weight",
        prj=r"blocks\.\d+\.attn\.proj\.weight",
        mlp=r"blocks\.\d+\.mlp\.fc[12]\.weight",
        attentions=(
            AttentionLayout(
                r"blocks\.\d+\.attn",
                heads="num_heads",
                per_query=(("mask_predictor.proj_c_q.weight", 1), ("mask_predictor.proj_c_k.weight", 1)),
                unless=(("averages_heads", "tokens are dropped by the mean over all heads"),),
            ),
        ),
    )

    def __init__(self, config: SparsifinerConfig, img_size: int | tuple[int, int] = 224, **kwargs: Any) -> None:
        make = partial(_make_block, config=config, grid=config.grid(img_size))
        super().__init__(config, make, img_size=img_size, **kwargs)
        self.prunes = config.token_rate is not None
        blocks: Any = self.blocks
        for block in blocks:
            block.attn.averages_heads = True if self.prunes else None

    # States between blocks: tokens; with token_rate also their numbers on the map

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.prunes:
            return (x,)
        numbers = torch.arange(x.shape[1] - 1, device=x.device)
        return x, numbers.expand(x.shape[0], -1)

    def step(self, block: nn.Module, state: tuple[Tensor, ...], size: tuple[int, int]) -> tuple[Tensor, ...]:
        out = self.call(block, *state, size=size)
        return out if self.prunes else (out,)

    def tokens(self, state: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
        return put_back(state[0], size, state[1], 1) if self.prunes else state[0]

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the tokens that are left, after the norm, unpooled."""
        x, size = self.embed(x)
        if torch.jit.is_scripting():
            if self.prunes:
                numbers = torch.arange(x.shape[1] - 1, device=x.device).expand(x.shape[0], -1)
                for block in self.blocks:
                    x, numbers = block(x, numbers, size)
            else:
                for block in self.blocks:
                    x = block(x, size)
            return self.norm(x)
        else:
            return self.finish(self.last_state(x, size))

    @torch.jit.ignore
    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As timm's; the predictors' tables are resampled too, and keep their number of basis vectors."""
        super().set_input_size(img_size, patch_size)
        for predictor in (m for m in self.modules() if isinstance(m, MaskPredictor)):
            predictor.resize(self.table_size)

    # Training

    @torch.jit.ignore
    def dense_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run phase 1's form: dense attention, and what each predictor makes of the attention matrix.

        Returns:
            The tokens after the norm, and one tensor (B, heads, N, 1 + N) per block: rows of all but the class token.
        """
        x, size = self.embed(x)
        approximations, blocks = [], list[Any](self.blocks)
        for block in blocks:
            out, approximation = dense_attention_of(block.attn, block.norm1(x), size)
            x = x + block.drop_path1(block.ls1(out))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            approximations.append(approximation)
        return self.norm(x), approximations

    @torch.jit.ignore
    def predictor_parameters(self) -> list[nn.Parameter]:
        """Return what phase 1 trains, and phase 2 freezes."""
        return [p for name, p in self.named_parameters() if ".mask_predictor." in name]


def dense_attention_of(attention: SparsifiedAttention, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a layer's output with dense attention, and its predictor's approximation of the matrix."""
    q, k, v = (t.transpose(1, 2) for t in attention.project(x))
    probs = (torch.matmul(q, k.mT) * attention.scale).softmax(-1)
    out = torch.matmul(probs, v).transpose(1, 2).flatten(2)
    return attention.proj_drop(attention.proj(out)), attention.mask_predictor.approximate(q, k, size)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Take weights of this model, or of DeiT, whose predictors keep their first values.

    Position embeddings of another image size are resampled; predictors' tables must have the model's size.

    Raises:
        ValueError: the weights are another model's.
    """
    state_dict = at_the_models_size(unwrap(checkpoint), model)
    return check_fits(with_own(state_dict, model, ".mask_predictor."), model)


SPARSIFINER: dict[str, Any] = {
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "pool_size": None,
    "license": "mit",
    "paper_ids": "arXiv:2303.13755",
    "paper_name": "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    "origin_url": "https://github.com/lim142857/Sparsifiner",
}
default_cfgs = generate_default_cfgs(
    {f"sparsifiner_deit_{size}.untrained": cfg(**SPARSIFINER) for size in ("tiny", "small")}
)
SMALL = SparsifinerConfig()


def _create(variant: str, config: SparsifinerConfig, pretrained: bool, **kwargs) -> Sparsifiner:
    return build_vit(Sparsifiner, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def sparsifiner_deit_tiny(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on DeiT-Ti, 5.9 M parameters, 1.3 GMACs at 224 with the whole matrix."""
    return _create("sparsifiner_deit_tiny", replace(SMALL, embed_dim=192, num_heads=3), pretrained, **kwargs)


@register_model
def sparsifiner_deit_small(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on DeiT-S, the authors' model, 22.3 M parameters, 4.8 GMACs at 224 with the whole matrix."""
    return _create("sparsifiner_deit_small", SMALL, pretrained, **kwargs)
