"""Any classifier of timm or of ours with attention pooling in place of its global pooling.

    model = pool_with(timm.create_model("resnet50"), "lama", heads=8)                 # in place
    timm.create_model("pooled", of="nat_mini", pool="gaam", heads=8)              # by name: recipes, hub folders

Where the pooling is: `attn_pool` of timm's ViTs, which then ignores the class token; `head.global_pool` of ConvNeXts,
Swins and our staged models; `global_pool` of ResNets and EfficientNets.
"""

from typing import Any, Literal

import timm
from timm.models import generate_default_cfgs, is_model, register_model, register_notrace_module, split_model_name_tag
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..attention_ops.attention_pool import GaussianPool, LamaPool
from ._build import M, build_features, cfg, names_weights

POOLS: dict[str, type[nn.Module]] = {"lama": LamaPool, "gaam": GaussianPool}
Pool = Literal["lama", "gaam"]
register_notrace_module(LamaPool)
register_notrace_module(GaussianPool)


@register_notrace_module
class MapPool(nn.Module):
    """Pool a map by its tokens, with the interface of timm's global pooling.

    Args:
        pool: from tokens (B, N, C) to (B, C).
        channels_last: maps are (B, H, W, C).
        flatten: return (B, C), not (B, C, 1, 1).
    """

    def __init__(self, pool: nn.Module, name: str, channels_last: bool, flatten: bool) -> None:
        super().__init__()
        self.pool = pool
        self.pool_type = name
        self.channels_last = channels_last
        self.flattens = flatten

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2) if self.channels_last else x.flatten(2).transpose(1, 2)
        pooled = self.pool(tokens)
        return pooled if self.flattens else pooled[:, :, None, None]

    def feat_mult(self) -> int:
        return 1

    def is_identity(self) -> bool:
        return False


def pool_with(model: M, pool: Pool, **kwargs: Any) -> M:
    """Replace the global pooling of a classifier by attention pooling, in place. Its weights are new.

    Call `reset_classifier` before, not after: some models make their pooling again there, and then raise.

    Args:
        model: a ViT of timm (or ours, plain), or a model with `head.global_pool` or `global_pool` on maps.
        pool: "lama" or "gaam".
        kwargs: of `LamaPool` or `GaussianPool`: `heads`; `gaussians`.

    Returns:
        The model.

    Raises:
        ValueError: no such pooling, the model has no place for it, or its classifier reads more than a map's channels.
    """
    if pool not in POOLS:
        raise ValueError(f"pool_with: pool must be one of {list(POOLS)}, got {pool!r}")
    like = next(model.parameters())
    made = POOLS[pool](_channels(model), **kwargs, device=like.device, dtype=like.dtype).train(model.training)
    if isinstance(model, VisionTransformer):
        vit: Any = model
        vit.attn_pool, vit.pool_include_prefix = made, False
        return model
    owner = _owner(model)
    before = owner.global_pool
    channels_last = getattr(owner, "input_fmt", "NCHW") == "NHWC"
    flattens = not hasattr(owner, "norm")  # timm's heads that pool first normalize a (B, C, 1, 1) map
    owner.global_pool = MapPool(made, pool, channels_last, flattens).train(before.training)
    return model


def _owner(model: nn.Module) -> Any:
    """Return the module that has `global_pool`."""
    for owner in (getattr(model, "head", None), model):
        if isinstance(getattr(owner, "global_pool", None), nn.Module):
            return owner
    raise ValueError(f"pool_with: {type(model).__name__} has no global pooling that can be replaced")


def _channels(model: Any) -> int:
    """Return the channels of the last map, which must be those that the head reads."""
    if isinstance(model, VisionTransformer):
        return model.embed_dim
    owner = _owner(model)
    if not getattr(owner.global_pool, "pool_type", ""):
        raise ValueError(f"pool_with: {type(model).__name__} does not pool (global_pool='')")
    if owner.global_pool.feat_mult() != 1:
        kind = owner.global_pool.pool_type
        raise ValueError(f"pool_with: the classifier reads what {kind!r} pooling joins; make the model with 'avg'")
    return owner.in_features if hasattr(owner, "in_features") else model.num_features


default_cfgs = generate_default_cfgs({"pooled.untrained": cfg(notes=("Takes of=, pool= and options of the pooling.",))})
OPTIONS = ("heads", "gaussians")


@register_model
def pooled(pretrained: bool = False, of: str = "", pool: Pool = "lama", **kwargs) -> nn.Module:
    """A model of another name with attention pooling.

    Args:
        pretrained: load the weights of `of`, or, with pretrained_cfg_overlay={"file": path}, a file saved from such a
            model.
        of: the name of the model; other keywords go to it.
        pool: "lama" or "gaam"; `heads` and `gaussians` are options of the pooling.

    Raises:
        ValueError: `of` is no registered name, or the pooling does not fit the model.
    """
    if not of or not is_model(split_model_name_tag(of)[0]):
        raise ValueError(f"pooled: of= wants a timm model name, got {of!r}")
    if kwargs.get("features_only"):
        raise ValueError(f"pooled: is a classifier; for features use {of} itself")
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    from_file = pretrained and names_weights(kwargs)

    def make(**arguments: Any) -> nn.Module:
        if arguments.get("global_pool") in POOLS:  # a hub folder of such a model says so
            del arguments["global_pool"]
        return pool_with(timm.create_model(of, pretrained and not from_file, **arguments), pool, **options)

    return build_features(make, "pooled", from_file, **kwargs)
