"""Shifted windows against Swin's blocks in timm, which roll the map and mask what the roll brought together."""

from itertools import pairwise

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock

from foveate.attention_ops import window_attention, window_attention_lse
from foveate.attention_ops._op import OPS
from foveate.attention_ops.shifted_windows import shift_mask

# (map, window, shift): both axes, one axis only, one window on an axis, shifts of 1 and of window - 1
CASES = [
    ((8, 12), (4, 4), (2, 2)),
    ((6, 10), (3, 5), (2, 1)),
    ((6, 10), (3, 5), (0, 4)),
    ((8, 6), (4, 3), (1, 0)),
    ((4, 10), (4, 5), (3, 2)),
    ((4, 5), (4, 5), (1, 3)),
    ((2, 9), (1, 3), (0, 1)),
]
every_case = pytest.mark.parametrize(("size", "window", "shift"), CASES, ids=str)
every_body = pytest.mark.parametrize("impl", ["reference", "tiled"])


def block_of(size, window, shift) -> SwinTransformerBlock:
    torch.manual_seed(0)
    made = SwinTransformerBlock(16, size, 2, None, window, shift, always_partition=True).double()
    torch.nn.init.normal_(made.attn.relative_position_bias_table)
    torch.nn.init.normal_(made.attn.qkv.bias)
    return made


@every_body
@every_case
def test_they_are_those_of_timms_swin_with_every_gradient(size, window, shift, impl):
    block = block_of(size, window, shift)
    x = torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, block.attn.relative_position_bias_table, block.attn.qkv.weight, block.attn.qkv.bias]
    q, k, v = block.attn.qkv(x).unflatten(-1, (3, 2, 8)).unbind(3)
    out = window_attention(q, k, v, window, shift=shift, bias=block.attn._get_rel_pos_bias()[0], impl=impl)
    probe = torch.randn(2, *size, 16, dtype=torch.float64)
    for ours, theirs in zip(
        *(
            [y, *torch.autograd.grad((y * probe).sum(), leaves)]
            for y in (block.attn.proj(out.flatten(3)), block._attn(x))
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@every_case
def test_the_mask_hides_what_timms_mask_hides(size, window, shift):
    theirs = block_of(size, window, shift).attn_mask
    ours = shift_mask(size, window, shift, torch.device("cpu"))
    assert torch.equal(ours, torch.ones_like(ours) if theirs is None else theirs == 0)


@every_body
@every_case
def test_ends_of_the_map_are_windows_of_their_own(size, window, shift, impl):
    """Cut the map where windows begin, and attend in each part by itself."""
    q, k, v = torch.randn(3, 1, *size, 2, 4, dtype=torch.float64).unbind(0)
    out, lse = window_attention_lse(q, k, v, window, shift=shift, impl=impl)
    rows, cols = (cuts(*axis) for axis in zip(size, window, shift, strict=True))
    assert len(rows) * len(cols) > 1 or size == window
    for row in rows:
        for col in cols:
            part = [x[:, row, col] for x in (q, k, v)]
            alone = window_attention_lse(*part, part[0].shape[1:3], impl="reference")
            torch.testing.assert_close((out[:, row, col], lse[:, row, col]), alone, rtol=0, atol=1e-12)


def cuts(length, window, shift):
    edges = sorted({0, length, *range(shift, length, window)})
    return [slice(a, b) for a, b in pairwise(edges)]


@every_body
def test_a_mask_applies_to_the_windows_of_the_rolled_map(impl):
    size, window, shift = CASES[1]
    q, k, v = torch.randn(3, 1, *size, 2, 4, dtype=torch.float64).unbind(0)
    mask = (torch.rand(4, 15, 15) < 0.5) | torch.eye(15, dtype=torch.bool)
    out = window_attention(q, k, v, window, shift=shift, mask=mask, impl=impl)
    rolled = (x.roll((-2, -1), (1, 2)) for x in (q, k, v))
    both = mask & shift_mask(size, window, shift, mask.device)
    expected = window_attention(*rolled, window, mask=both, impl="reference").roll(shift, (1, 2))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [(3, 0), (0, 5), (-1, 0), 3])
def test_a_shift_out_of_range_is_refused(shift):
    q = torch.zeros(1, 6, 10, 1, 4)
    with pytest.raises(ValueError, match=r"window_attention: shift must be 0 to window_size - 1 = \(2, 4\), got"):
        window_attention(q, q, q, (3, 5), shift=shift)


def test_pairs_that_a_shift_cuts_off_are_not_counted():
    (height, width), window, shift = CASES[1]
    q, v = torch.zeros(2, height, width, 3, 4), torch.zeros(2, height, width, 3, 5)
    pairs = int(shift_mask((height, width), window, shift, q.device).sum())
    assert OPS["window_attention"].useful_macs(q, q, v, window, shift=shift) == 2 * 3 * pairs * (4 + 5)


def test_values_of_another_width_are_refused_where_their_map_differs():
    q = torch.zeros(1, 6, 10, 2, 4)
    assert window_attention(q, q, torch.zeros(1, 6, 10, 2, 7), (3, 5)).shape == (1, 6, 10, 2, 7)
    with pytest.raises(ValueError, match=r"v must be \(1, 6, 10, 2, 'value_dim'\) as q, got \(1, 6, 5, 2, 7\)"):
        window_attention(q, q, torch.zeros(1, 6, 5, 2, 7), (3, 5))
