"""Halo attention against a loop, timm's layer and bad callers."""

import pytest
import torch
from timm.layers.halo_attn import HaloAttn

from foveate.attention_ops import HaloAttention2d, halo_attention, halo_cpu, window_attention


def by_loop(q, k, v, block, halo, stride, rel_h, rel_w, scale):
    """The definition, one query at a time; keys outside the map are zeros and take part."""
    out = q.new_zeros(*q.shape[:4], v.shape[-1])
    window = [b + 2 * h for b, h in zip(block, halo, strict=True)]
    per_block = [b // stride for b in block]
    for y in range(q.shape[1]):
        for x in range(q.shape[2]):
            top = y // per_block[0] * block[0] - halo[0]
            left = x // per_block[1] * block[1] - halo[1]
            logits, values = [], []
            for i in range(window[0]):
                for j in range(window[1]):
                    row, col = top + i, left + j
                    inside = 0 <= row < k.shape[1] and 0 <= col < k.shape[2]
                    key = k[:, row, col] if inside else torch.zeros_like(k[:, 0, 0])
                    values.append(v[:, row, col] if inside else torch.zeros_like(v[:, 0, 0]))
                    logit = (q[:, y, x] * key).sum(-1) * scale
                    if rel_h is not None:
                        cell = rel_h[i - y % per_block[0] + window[0] - 1] + rel_w[j - x % per_block[1] + window[1] - 1]
                        logit = logit + q[:, y, x] @ cell
                    logits.append(logit)
            probs = torch.stack(logits).softmax(0)
            out[:, y, x] = (probs[..., None] * torch.stack(values)).sum(0)
    return out


def tensors(size, stride, block, halo, heads=2, dim=3, value_dim=4, tables=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    kv = normal(2, *size, heads, dim + value_dim)
    q = normal(2, -(-size[0] // stride), -(-size[1] // stride), heads, dim)
    rel = [normal(2 * (b + 2 * h) - 1, dim) for b, h in zip(block, halo, strict=True)] if tables else [None, None]
    return q, kv[..., :dim], kv[..., dim:], *rel


CASES = [  # size, block, halo, stride
    ((6, 8), (3, 4), (1, 1), 1),
    ((4, 8), (4, 4), (2, 1), 2),
    ((5, 7), (4, 2), (1, 2), 1),  # the last blocks overhang
    ((7, 5), (4, 4), (1, 1), 2),  # an odd map under strided queries
    ((2, 3), (4, 4), (2, 2), 1),  # one block larger than the map
]


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("tables", [True, False], ids=["relative", "plain"])
@pytest.mark.parametrize(("size", "block", "halo", "stride"), CASES)
def test_it_is_the_definition_with_every_gradient(size, block, halo, stride, tables, impl):
    q, k, v, rel_h, rel_w = tensors(size, stride, block, halo, tables=tables)
    out = halo_attention(q, k, v, block, halo, stride=stride, rel_h=rel_h, rel_w=rel_w, impl=impl)
    expected = by_loop(q, k, v, block, halo, stride, rel_h, rel_w, q.shape[-1] ** -0.5)
    torch.testing.assert_close(out, expected)
    with torch.no_grad():  # another body
        out_alone = halo_attention(q, k, v, block, halo, stride=stride, rel_h=rel_h, rel_w=rel_w, impl=impl)
    torch.testing.assert_close(out_alone, expected.detach())
    probe = torch.randn_like(expected)
    inputs = [t for t in (q, k, v, rel_h, rel_w) if t is not None]
    torch.testing.assert_close(*(torch.autograd.grad((y * probe).sum(), inputs) for y in (out, expected)))


def test_without_a_halo_it_is_window_attention():
    q, k, v = torch.randn(3, 2, 6, 8, 2, 4, dtype=torch.float64).unbind(0)
    torch.testing.assert_close(halo_attention(q, k, v, (3, 4), 0), window_attention(q, k, v, (3, 4)))


def test_keys_outside_the_map_take_softmax_mass():
    q, v = torch.zeros(1, 2, 2, 1, 1), torch.ones(1, 2, 2, 1, 1)
    out = halo_attention(q, q, v, 2, 1)
    torch.testing.assert_close(out, torch.full_like(v, 4 / 16))  # 12 of the 16 keys are zeros beyond the border


def test_the_layer_equals_timms(det, golden, relative_error):
    cases, arrays = golden("module__halo")
    tried = 0
    for name, case in cases.items():
        if "args" not in case:
            continue
        arguments = dict(case["args"])
        renames = {"num_heads": "heads", "halo_size": "halo", "dim_head": "head_dim", "scale_pos_embed": "scale_rel"}
        layer = HaloAttention2d(case["dim"], **{renames.get(key, key): value for key, value in arguments.items()})
        weights = det.det_state_dict(case["state_dict"])
        layer.load_state_dict({key.removeprefix("self_attn."): value for key, value in weights.items()})
        x = torch.from_numpy(det.det_input(case["x"]["shape"], case["x"]["seed"])).requires_grad_()
        out = layer(x)
        assert list(out.shape) == case["out_shape"]
        (out * torch.from_numpy(det.det_input(out.shape, 15))).sum().backward()
        assert relative_error(out, arrays[f"{name}/out"]) < 1e-5, name
        assert relative_error(x.grad, arrays[f"{name}/dx"]) < 1e-5, name
        for key, parameter in layer.named_parameters():
            assert relative_error(parameter.grad, arrays[f"{name}/d.{key}"]) < 2e-5, (name, key)
        tried += 1
    assert tried == 7


@pytest.mark.parametrize("avg_down", [False, True], ids=["", "avg_down"])
@pytest.mark.parametrize(("block", "size"), [(4, (8, 12)), (7, (14, 28)), (7, (7, 21)), (6, (6, 18))])
def test_the_layer_equals_timms_under_stride_on_every_map_that_timm_takes(block, size, avg_down):
    theirs = HaloAttn(16, 24, stride=2, num_heads=2, block_size=block, halo_size=2, avg_down=avg_down)
    ours = HaloAttention2d(16, 24, stride=2, heads=2, block_size=block, halo=2, avg_down=avg_down)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, *size)
    expected, out = theirs(x), ours(x)
    assert out.shape[2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    torch.testing.assert_close(out[:, :, : size[0] // 2, : size[1] // 2], expected)  # timm pools odd maps to fewer


@pytest.mark.parametrize(("stride", "block", "size"), [(1, 4, (7, 5)), (2, 4, (7, 5)), (2, 7, (9, 8))])
def test_the_layer_takes_maps_that_blocks_do_not_cover(stride, block, size):
    layer = HaloAttention2d(16, stride=stride, heads=2, block_size=block, halo=1)
    assert layer(torch.randn(2, 16, *size)).shape == (2, 16, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(1, 4, 4, 8)}, r"q must be \(B, H, W, heads, head_dim\), got shape"),
        (
            {"q": torch.zeros(1, 3, 4, 2, 8)},
            r"q must be \(1, 4, 4, 2, 8\) for k .* and stride 1, got \(1, 3, 4, 2, 8\)",
        ),
        ({"v": torch.zeros(1, 4, 3, 2, 8)}, r"v must be \(1, 4, 4, 2, 'value_dim'\) as k"),
        (
            {"k": torch.zeros(1, 4, 4, 2, 8, dtype=torch.float64)},
            "k must have the dtype of q torch.float32, got torch.float64",
        ),
        ({"block_size": 0}, r"block_size must be at least 1, got \(0, 0\)"),
        ({"halo": -1}, r"halo must be at least 0, got \(-1, -1\)"),
        ({"stride": 3}, r"stride must divide block_size \(4, 4\), got 3"),
        ({"rel_h": torch.zeros(11, 8)}, "rel_h and rel_w must both be given, or none"),
        (
            {"q": torch.zeros(1, 0, 4, 2, 8), "k": (none := torch.zeros(1, 0, 4, 2, 8)), "v": none},
            "H, W, heads and head_d",
        ),
        (
            {"rel_h": torch.zeros(11, 8, device="meta"), "rel_w": torch.zeros(11, 8)},
            "rel_h must be on the device of q cpu",
        ),
        ({"rel_h": torch.zeros(11, 8), "rel_w": torch.zeros(9, 8)}, r"rel_w must be .* = \(11, 8\), got \(9, 8\)"),
    ],
)
def test_bad_input_is_refused_by_name(changes, words):
    zeros = torch.zeros(1, 4, 4, 2, 8)
    arguments = {"q": zeros, "k": zeros, "v": zeros, "block_size": 4, "halo": 1, **changes}
    with pytest.raises(ValueError, match=f"halo_attention: {words}"):
        halo_attention(**arguments)


@pytest.mark.parametrize("logits", [1, 2000, 20_000], ids=["one", "a few", "many"])
def test_parts_of_images_heads_and_tiles_equal_the_whole(monkeypatch, logits):
    torch.manual_seed(0)
    leaves = [torch.randn(s).requires_grad_() for s in ((6, 6, 9, 4, 8), (6, 6, 9, 4, 20), (11, 8), (15, 8))]

    def results():
        q, kv, rel_h, rel_w = leaves
        inputs = q, kv[..., :8], kv[..., 8:], (2, 4), (2, 2)
        out = halo_attention(*inputs, rel_h=rel_h, rel_w=rel_w)
        with torch.no_grad():
            out_alone = halo_attention(*inputs, rel_h=rel_h, rel_w=rel_w)
        return [out, out_alone, *torch.autograd.grad(out.square().sum(), leaves)]

    whole = results()
    monkeypatch.setattr(halo_cpu, "CHUNK_LOGITS", logits)
    torch.testing.assert_close(results(), whole, rtol=1e-4, atol=1e-4)
