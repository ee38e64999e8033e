"""DCAL: any plain ViT of timm with a second head that looks at its most important patches, for fine-grained classes.

Paper      Zhu, Ke, Li, Liu, Tian, Shan 2022, arXiv:2205.02151 (Dual Cross-Attention Learning).
Status     no official code or weights are public; see attention_ops/local_queries.py for what is open.
Branches   "sa": the ViT. "glca": one block of global-local cross-attention on its last tokens, with a classifier of its
           own. "pwca", in training only: the ViT again, each query attending to the keys of another image too.
Output     the logarithm of the mean of both branches' class probabilities (the paper adds them).
Training   the key `loss.branches` of a recipe trains all branches with learned weights of their losses.
We differ  pairs are drawn inside the batch, at random.

    timm.create_model("dcal", of="vit_small_patch16_224", pretrained=True, local_share=0.1)
"""

import math
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models import generate_default_cfgs, is_model, register_model, split_model_name_tag
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops.local_queries import (
    GlobalLocalCrossAttention,
    attention_probabilities,
    pairwise_keys,
    rollout_row,
)
from ._build import StateDict, build_features, cfg, check_fits, names_weights
from ._pruning import Prunable
from ._staged import take_image

BRANCHES = ("sa", "glca", "pwca")


class LocalBlock(nn.Module):
    """A transformer block whose attention is that of local queries."""

    def __init__(self, dim: int, heads: int, share: float, prefix: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = GlobalLocalCrossAttention(dim, heads, share, prefix=prefix, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)

    def forward(self, x: Tensor, importance: Tensor) -> Tensor:  # (B, N, C), (B, N)
        x = x + self.attn(self.norm1(x), importance)
        return x + self.mlp(self.norm2(x))


class Dcal(nn.Module):
    """A ViT of timm with dual cross-attention.

    The layers of the blocks are called one by one, so that pairs share the weights of self-attention: hooks on
    `blocks.i` and `blocks.i.attn` are not called, hooks on the layers inside are.

    Args:
        net: a ViT with a class token, timm's `Block` and timm's `Attention`.
        local_share: of the patches that are local queries: 0.1 for fine-grained classes, 0.3 for re-identification.

    Raises:
        ValueError: the model is no such ViT.
    """

    prunable = Prunable(mlp=r"(net\.blocks\.\d+|local)\.mlp\.fc[12]\.weight")

    def __init__(self, net: VisionTransformer, local_share: float = 0.1) -> None:
        super().__init__()
        _check_vit(net)
        like = next(net.parameters())
        dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.net = net
        self.num_classes, self.in_chans, self.num_features = net.num_classes, net.in_chans, net.num_features
        self.head_hidden_size, self.feature_info = net.head_hidden_size, net.feature_info
        first: Any = net.blocks[0]
        self.local = LocalBlock(net.embed_dim, first.attn.num_heads, local_share, net.num_prefix_tokens, **dd)
        self.local_norm = nn.LayerNorm(net.embed_dim, eps=1e-6, **dd)
        self.head = nn.Linear(net.embed_dim, net.num_classes, **dd) if net.num_classes > 0 else nn.Identity()
        self.loss_weights = nn.Parameter(torch.zeros(len(BRANCHES), **dd))  # for `loss.branches` of a recipe
        self.keeps_branches = False  # whether training keeps the logits of all branches, for a loss of each
        self.branch_logits: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        """Return log probabilities. In training, with `keeps_branches`, `branch_logits` gets all branches' logits."""
        x = take_image(x)
        branches = self.branches(x)
        if self.training and self.keeps_branches:
            partner = torch.randperm(len(x), device=x.device)
            self.branch_logits = branches | {"pwca": self.paired_logits(x, partner)}
        return mean_log_probability(branches["sa"], branches["glca"])

    def branches(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of the branches that inference has, "sa" and "glca"."""
        tokens, importance = self.tokens(x)
        local = self.local_norm(self.local(tokens, importance))
        return {"sa": self.net.forward_head(self.net.norm(tokens)), "glca": self.head(local[:, 0])}

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens after the last block (B, N, C), and how much each matters to the class token (B, N)."""
        tokens, pairs, blocks = self._embed(x), [], self.blocks()
        for block in blocks:
            tokens, q, k = run_block(block, tokens, None)
            pairs.append((q.detach(), k.detach(), block.attn.scale))
        return tokens, rollout_row(attention_probabilities(*pair) for pair in reversed(pairs))

    def paired_logits(self, x: Tensor, partner: Tensor) -> Tensor:
        """Return the logits of the ViT where every image attends to itself and to image partner[i]: (B, classes)."""
        tokens = self._embed(x)
        for block in self.blocks():
            tokens, _, _ = run_block(block, tokens, partner)
        return self.net.forward_head(self.net.norm(tokens))

    def blocks(self) -> Any:
        """Return the blocks of the ViT."""
        return self.net.blocks

    def _embed(self, x: Tensor) -> Tensor:
        net = self.net
        return net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the tokens of the ViT after its norm, (B, N, C)."""
        return self.net.norm(self.tokens(take_image(x))[0])

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the ViT's own: maps of its blocks."""
        return self.net.forward_intermediates(x, *args, **kwargs)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give both branches new classifiers."""
        self.net.reset_classifier(num_classes, global_pool)
        like, self.num_classes = self.local_norm.weight, num_classes
        head = nn.Linear(len(like), num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        self.head = head.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Say which parameters belong to one layer; `coarse` groups are the same."""
        last = r"^local|^net\.norm" if coarse else r"^(local|net\.norm|loss_weights)"
        stem = r"^net\.(cls_token|reg_token|pos_embed|patch_embed|norm_pre)"
        return {"stem": stem, "blocks": [(r"^net\.blocks\.(\d+)", None), (last, (99999,))]}

    def no_weight_decay(self) -> set[str]:
        own = {f"net.{name}" for name in self.net.no_weight_decay()} | {"loss_weights"}
        return own & dict(self.named_parameters()).keys()


def run_block(block: Any, x: Tensor, partner: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Run a block of timm's ViT; with partners its queries see the keys of their image's partner too.

    Returns:
        The block's output, and the queries and keys of its attention, (B, heads, N, d), of its own image.
    """
    out, q, k = _attend(block.attn, block.norm1(x), partner)
    x = x + block.drop_path1(block.ls1(out))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), q, k


def _attend(attn: Any, x: Tensor, partner: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    keys, values = (k, v) if partner is None else (pairwise_keys(k, partner), pairwise_keys(v, partner))
    dropped = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, keys, values, dropout_p=dropped, scale=attn.scale)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    out = out if attn.gate is None else out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out)), q, k


def mean_log_probability(a: Tensor, b: Tensor) -> Tensor:
    """Return the logarithm of the mean of two heads' class probabilities, from their logits (B, classes)."""
    return torch.stack([a.log_softmax(-1), b.log_softmax(-1)]).logsumexp(0) - math.log(2)


def _check_vit(net: Any) -> None:
    if type(net) is not VisionTransformer:
        raise ValueError(f"dcal: of= wants a plain ViT of timm (VisionTransformer), got {type(net).__name__}")
    strange = next((b for b in net.blocks if type(b) is not Block or type(b.attn) is not Attention), None)
    if strange is not None:
        inside = type(getattr(strange, "attn", strange)).__name__
        raise ValueError(f"dcal: wants timm's Block with its Attention, got {type(strange).__name__} with {inside}")
    if not net.has_class_token:
        raise ValueError("dcal: the patches that matter are those of the class token, and this ViT has none")


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: Dcal) -> StateDict:
    """Take a plain ViT's weights as those of the ViT inside, with new weights for the other layers; ours pass through.

    Raises:
        ValueError: the weights are another model's.
    """
    state_dict = unwrap(checkpoint)
    if not any(key.startswith("net.") for key in state_dict):
        own = {key: value for key, value in model.state_dict().items() if not key.startswith("net.")}
        state_dict = {f"net.{key}": value for key, value in vit_checkpoint(state_dict, model.net).items()}
        state_dict |= own
    return check_fits(state_dict, model)


DCAL: dict[str, Any] = {
    "classifier": ("net.head", "head"),
    "first_conv": "net.patch_embed.proj",
    "pool_size": None,
    "paper_ids": "arXiv:2205.02151",
    "paper_name": "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
    "notes": ("Takes of= (a plain ViT of timm) and local_share=; pretrained=True loads the ViT's weights.",),
}
default_cfgs = generate_default_cfgs({"dcal.untrained": cfg(**DCAL)})


@register_model
def dcal(pretrained: bool = False, of: str = "", local_share: float = 0.1, **kwargs) -> nn.Module:
    """A plain ViT of timm with dual cross-attention.

    Args:
        pretrained: load the ViT's weights; with pretrained_cfg_overlay={"file": path}, those of a file instead.
        of: the ViT's name; other keywords go to it.
        local_share: of the patches that are local queries.

    Raises:
        ValueError: `of` is no plain ViT of timm with a class token, or features_only is asked for.
    """
    if not of or not is_model(split_model_name_tag(of)[0]):
        raise ValueError(f"dcal: of= wants the name of a plain ViT of timm, got {of!r}")
    if kwargs.get("features_only"):
        raise ValueError(f"dcal: is a classifier; for features use {of} itself")
    from_file = pretrained and names_weights(kwargs)

    def make(**arguments: Any) -> Dcal:
        vit: Any = timm.create_model(of, pretrained and not from_file, **arguments)
        return Dcal(vit, local_share)

    return build_features(make, "dcal", from_file, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)
