"""What timm asks of a backbone, once for every family: a stem, stages that each give a map, a norm, a classifier."""

from collections.abc import Sequence
from typing import Final

import torch
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor, fx, nn

from ._layers import to_channels_last


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
    return feature_take_indices(maps, indices)


class StagedBackbone(nn.Module):
    """Base of the families. A subclass builds `stem`, `stages` (nn.Sequential), `norm`, then calls `finish`.

    Every stage maps a map to a map in the family's layout (`output_fmt`), does its own down-sampling first, and owns
    `grad_checkpointing`. `norm` acts on the last map only.
    """

    output_fmt = "NCHW"
    channels_last: Final[bool] = False  # whether a convolutional family runs channels-last on a CPU

    def finish(
        self,
        dims: tuple[int, ...],
        reductions: list[int],
        *,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        device=None,
        dtype=None,
    ) -> None:
        """Set the classifier and the attributes that timm reads.

        Args:
            dims: channels of each stage's map.
            reductions: image pixels per token of each stage's map.
        """
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.stride_px = reductions[-1]
        self.head = ClassifierHead(
            dims[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, device=device, dtype=dtype
        )
        self.head_hidden_size = self.head.num_features

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
                maps.append(y.permute(0, 3, 1, 2) if self.output_fmt == "NHWC" else y)
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
            stage.grad_checkpointing = enable

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
