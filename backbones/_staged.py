"""What timm asks of a backbone, once for every family: a stem, stages that each give a map, a norm, a classifier."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.layers import ClassifierHead, NormMlpClassifierHead, calculate_drop_path_rates, get_device_dtype
from timm.models import checkpoint_seq, register_notrace_function
from torch import Tensor, fx, nn

from .._timm import feature_take_indices
from ._layers import to_channels_last, to_nchw

Head = ClassifierHead | NormMlpClassifierHead


@register_notrace_function
def take_image(x: Tensor, least_px: int = 1, channels_last: bool = False) -> Tensor:
    """Return the image batch in the memory layout that the model wants; the first convolution checks the channels.

    Raises:
        ValueError: not (B, C, H, W), or a side is shorter than `least_px`.
    """
    if x.dim() != 4 or x.shape[2] < least_px or x.shape[3] < least_px:
        raise ValueError(f"the image must be (B, C, H, W) with sides of at least {least_px} px, got {list(x.shape)}")
    if channels_last and not x.is_cuda:
        return to_channels_last(x)
    return x


fx.wrap("take_image")  # a graph of the whole model calls it


def check_indices(name: str, indices: int | Sequence[int] | None, maps: int) -> None:
    """Check a choice of feature maps: the last n if an int, those maps if a sequence, all if None.

    Args:
        name: of the argument, for the error.
        maps: feature maps that the model has.

    Raises:
        ValueError: a map is chosen that the model does not have, or none at all.
    """
    if indices is None:
        return
    if isinstance(indices, int):
        fits = 1 <= indices <= maps
    else:
        fits = len(indices) > 0 and all(isinstance(i, int) and -maps <= i < maps for i in indices)
    if not fits:
        raise ValueError(
            f"{name} must be the number of last feature maps, 1 to {maps}, or a sequence of maps from {-maps} to "
            f"{maps - 1}, got {indices!r}"
        )


def take_maps(maps: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Return the chosen feature maps, counted from the first, and the last of them (see `check_indices`)."""
    check_indices("indices", indices, maps)
    return feature_take_indices(maps, indices if indices is None or isinstance(indices, int) else list(indices))


@dataclass(frozen=True)
class StageConfig:
    """Sizes that every family has. A family's config gives the published defaults and adds its own fields.

    Raises:
        ValueError: a field of `per_stage` has not one entry per stage.
    """

    dims: tuple[int, ...]  # channels, per stage
    depths: tuple[int, ...]  # blocks, per stage

    per_stage: ClassVar[tuple[str, ...]] = ("depths",)

    def __post_init__(self) -> None:
        check_stages(self, self.per_stage, len(self.dims))

    @property
    def reductions(self) -> list[int]:
        """Image pixels per token, per stage."""
        return [4 * 2**i for i in range(len(self.dims))]


def check_stages(config: object, names: Iterable[str], stages: int) -> None:
    """Check that the named fields have one entry per stage.

    Raises:
        ValueError: one has more or fewer.
    """
    for name in names:
        if len(value := getattr(config, name)) != stages:
            raise ValueError(f"{name} must have one entry per stage, {stages}, got {value}")


class Stage(nn.Module):
    """Down-sampling, then blocks, which run again in the backward pass under gradient checkpointing."""

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        return self.run_blocks(self.downsample(x))

    def run_blocks(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class StagedBackbone(nn.Module):
    """Base of the families. A subclass makes the stem, a stage and, where it has one, the norm behind the last stage.

    Every stage maps a map to a map in the family's layout (`output_fmt`), does its own down-sampling first, and owns
    `grad_checkpointing`. `norm` acts on the last map only.

    Args:
        config: sizes and kinds of layers.
        num_classes, in_chans, global_pool, drop_rate: as in timm; drop_rate acts before the classifier.
        proj_drop_rate: dropout inside the blocks; `make_stage` of the family says where.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
    """

    output_fmt = "NCHW"
    __constants__ = ("channels_last",)  # TorchScript reads it; subclasses replace the value, which Final forbids
    channels_last: bool = False  # whether a convolutional family runs channels-last on a CPU

    def __init__(
        self,
        config: StageConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = config.dims[-1]
        self.stride_px = config.reductions[-1]
        self.grad_checkpointing = False
        infos: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(config.dims, config.reductions, strict=True))
        ]
        self.feature_info = infos
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(config.depths), stagewise=True)  # lists, by stage
        self.stem = self.make_stem(config, in_chans, **dd)
        self.stages = nn.Sequential(
            *(self.make_stage(config, i, proj_drop_rate, own, **dd) for i, own in enumerate(rates))
        )
        self.norm = self.make_norm(config.dims[-1], **dd)
        self.head = self.make_head(config.dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    # `config` is the config of the family, a subclass of StageConfig. It is not a type parameter of this class:
    # typing.Generic would add its own attributes to scripted models.

    def make_stem(self, config: Any, in_chans: int, **dd) -> nn.Module:
        """Make what turns images (B, in_chans, H, W) into the first stage's map."""
        raise NotImplementedError

    def make_stage(self, config: Any, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        """Make one stage; `drop_paths` holds the rate of each of its blocks."""
        raise NotImplementedError

    def make_norm(self, dim: int, **dd) -> nn.Module:
        return nn.Identity()

    def make_head(self, dim: int, num_classes: int, global_pool: str, drop_rate: float, **dd) -> Head:
        return ClassifierHead(dim, num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd)

    def init_weights(self) -> None:
        """Draw the weights of linear layers as ViTs do; the other layers begin as torch makes them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map after the norm, unpooled."""
        x = self.stem(take_image(x, self.stride_px, self.channels_last))
        return self.norm(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    # timm's contract

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last map and the maps of the chosen stages, as (B, C, H, W).

        Args:
            x: images (B, C, H, W).
            indices: the last n stages if an int, those stages if a list, all if None.
            norm: apply the final norm to the last stage's map too.
            stop_early: run no stage past the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: leave the last map out of the answer.

        Raises:
            ValueError: the images are too small, the model has no such stage, or output_fmt is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW', got {output_fmt!r}")
        take, max_index = take_maps(len(self.stages), indices)
        last = len(self.stages) - 1
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        x = self.stem(take_image(x, self.stride_px, self.channels_last))
        maps = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                y = self.norm(x) if norm and i == last else x
                maps.append(to_nchw(y) if self.output_fmt == "NHWC" else y)
        if intermediates_only:
            return maps
        return (self.norm(x) if len(stages) == len(self.stages) else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages do not need; return their indices.

        Raises:
            ValueError: the model has no such stage.
        """
        take, max_index = take_maps(len(self.stages), indices)
        cut = max_index < len(self.stages) - 1
        if prune_norm or cut:
            self.norm = nn.Identity()
        self.stages = self.stages[: max_index + 1]
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
            self.stride_px = self.feature_info[max_index]["reduction"]
        if prune_head or cut:
            self.reset_classifier(0, "", reset_other=True)
        return take

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        self.num_classes = num_classes
        self.head.reset(
            num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **get_device_dtype(self)
        )
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]  # nn.Sequential yields nn.Module

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Say which parameters belong to one layer, for layer-wise learning rates."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99998,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()
