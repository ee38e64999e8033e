"""The arguments of aggregated attention that belong together: pooled keys with their bias, and local keys."""

from typing import NamedTuple

from torch import Tensor


class Pooled(NamedTuple):
    """Keys and values that every query sees, and the bias of a pair: table[head, rows[y, py], cols[x, px]]."""

    k: Tensor
    v: Tensor
    table: Tensor
    rows: Tensor
    cols: Tensor

    @staticmethod
    def of(pooled_k: Tensor, pooled_v: Tensor, pooled_bias: Tensor, bias_rows: Tensor, bias_cols: Tensor) -> "Pooled":
        return Pooled(pooled_k, pooled_v, pooled_bias, bias_rows, bias_cols)


class Local(NamedTuple):
    """Keys and values of the map, the bias of each place of the kernel, and the weights that are no probabilities."""

    k: Tensor
    v: Tensor
    bias: Tensor
    tokens: Tensor
    token_bias: Tensor

    @staticmethod
    def of(
        local_k: Tensor | None,
        local_v: Tensor | None,
        local_bias: Tensor | None,
        tokens: Tensor | None,
        token_bias: Tensor | None,
    ) -> "Local":
        """All are given, or none: the op checks it before a body reads them."""
        return Local(local_k, local_v, local_bias, tokens, token_bias)  # type: ignore[arg-type]

    @property
    def given(self) -> bool:
        return any(t is not None for t in self)

    def missing(self) -> str | None:
        names = ("local_k", "local_v", "local_bias", "tokens", "token_bias")
        return next((name for name, t in zip(names, self, strict=True) if t is None), None)

    @property
    def kernel(self) -> tuple[int, int]:
        """(rows, columns); (0, 0) without local keys."""
        return (self.bias.shape[1], self.bias.shape[2]) if self.given else (0, 0)
