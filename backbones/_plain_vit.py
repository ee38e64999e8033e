"""timm's VisionTransformer with other blocks, any image size and the errors of our own backbones."""

from collections.abc import Callable

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ._staged import take_image
from ._timm_classes import _Checked


class PlainViT(_Checked, VisionTransformer):
    """A plain ViT: patches, class token, learned positions, blocks (B, N, C) -> (B, N, C), norm, classifier.

    Images of any size run: they are padded to whole patches, and the position table is resampled (bicubic) when the
    number of patches is not that of `img_size`.

    Args:
        make_block: makes a block from (dim, proj_drop, drop_path, device=, dtype=).
        img_size: pixels, an int or (height, width), that the position table is made for.
        patch_size, in_chans, num_classes, global_pool, drop_rate, pos_drop_rate, patch_drop_rate: as in timm.
        proj_drop_rate, drop_path_rate: dropout inside the blocks; stochastic depth of the last block.
    """

    def __init__(
        self,
        make_block: Callable[..., nn.Module],
        embed_dim: int,
        depth: int,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        def block_fn(*, dim: int, proj_drop: float, drop_path: float, device=None, dtype=None, **_) -> nn.Module:
            return make_block(dim, proj_drop, drop_path, device=device, dtype=dtype)

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,  # type: ignore[arg-type]  # timm checks the name
            embed_dim=embed_dim,
            depth=depth,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            patch_drop_rate=patch_drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            block_fn=block_fn,  # type: ignore[arg-type]  # timm wants a class, and calls it
            device=device,
            dtype=dtype,
        )
        self.table_size = list(self.patch_embed.grid_size)  # (rows, columns) of the position table

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """As timm's: resample the position table, and with patch_size the first convolution."""
        super().set_input_size(img_size, patch_size)
        self.table_size = list(self.patch_embed.grid_size)

    def _pos_embed(self, x: Tensor) -> Tensor:  # (B, rows, columns, embed_dim) -> (B, 1 + rows * columns, embed_dim)
        size = [x.shape[1], x.shape[2]]
        table = resample_abs_pos_embed(self.pos_embed, size, self.table_size, num_prefix_tokens=1)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)  # type: ignore[union-attr]
        return self.pos_drop(x + table)

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.patch_embed(take_image(x))
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.forward_head(self.forward_features(x))
