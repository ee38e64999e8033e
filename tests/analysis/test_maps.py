"""The probabilities of every layer are those that its values are multiplied with."""

import pytest
import timm
import torch
from small_models import KINDS, alive, small

from foveate.analysis import attention_maps
from foveate.analysis.capture import SDPA, SOFTMAX, parts_of, watching
from foveate.attention_ops._op import OPS

WITHOUT = ("van", "eca", "ela", "ulsam")  # gates: no queries and keys
ATTENDING = [name for name in KINDS if not name.startswith(WITHOUT)]
X = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
TIMM = {
    "vit_tiny_patch16_224": {"img_size": 48, "depth": 2, "embed_dim": 24, "num_heads": 3},
    "vit_small_patch16_dinov3": {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 48},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)},
    "swinv2_tiny_window8_256": {"img_size": 64, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)},
    "deit3_small_patch16_224": {"img_size": 48, "depth": 1, "embed_dim": 24, "num_heads": 3},
}


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def values_and_outputs(model, x):
    """(values, output) of every part of every call: (B, keys, heads, d) and (B, queries, heads, d).

    Gates are applied to no output; that of aggregated attention is computed without the weights that are no
    probabilities, for values of one kind of keys.
    """
    found = []

    def see(call, out):
        if call.op == SDPA:
            found.append((call.arguments["value"].transpose(1, 2), out.transpose(1, 2)))
        elif call.op in OPS and call.op != "channel_attention":
            for part in parts_of(call):
                values = part.v
                plain = part.with_values(values)
                other = {"local": "pooled_v", "pooled": "local_v"}.get(part.branch)
                first = OPS[call.op](**plain | ({other: torch.zeros_like(plain[other])} if other else {}))
                first = first[0] if isinstance(first, tuple) else first
                found.append((values.flatten(1, -3), first[..., part.heads, :].flatten(1, -3)))
        return out

    with torch.no_grad(), watching(model, see):
        model(x)
    return found


def check(model, x):
    maps = [one for one in attention_maps(model, x) if one.op not in (SOFTMAX, "channel_attention")]
    maps = [one for one in maps if one.branch not in ("gather", "read")]
    pairs = values_and_outputs(model, x)
    assert len(maps) == len(pairs)
    for one, (values, out) in zip(maps, pairs, strict=True):
        probabilities = one.probabilities()
        assert probabilities.shape == (len(out), one.heads, out.shape[1], values.shape[1]), one.layer
        assert (probabilities >= 0).all()
        assert one.op == "reversed_attention" or (probabilities.sum(-1) <= 1 + 1e-5).all()
        if values.shape[2] == one.heads:  # else heads share values
            again = torch.einsum("bhqk,bkhd->bqhd", probabilities, values.to(probabilities.dtype))
            torch.testing.assert_close(again, out.to(again.dtype), rtol=1e-4, atol=1e-5 * float(out.std()) + 1e-7)
        some = [one.queries - 1, 0]
        torch.testing.assert_close(one.probabilities(some), probabilities[:, :, some])


@pytest.mark.parametrize("name", ATTENDING)
def test_probabilities_times_values_are_the_output_of_every_layer(name):
    check(alive(small(name)), X)


@pytest.mark.parametrize("name", TIMM)
def test_vits_and_swins_of_timm_too(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **TIMM[name]).eval()
    x = torch.randn(2, 3, *(TIMM[name]["img_size"],) * 2)
    maps = attention_maps(model, x)
    blocks = [n for n, m in model.named_modules() if n.endswith(".attn")]
    assert [one.layer for one in maps] == blocks
    assert all(one.query_size is not None for one in maps)
    for one in maps:
        torch.testing.assert_close(one.probabilities().sum(-1), torch.ones(()).expand(one.probabilities().shape[:3]))
    check(model, x)


def test_what_timm_spells_out_gives_the_same_probabilities():
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=5).eval()
    x = torch.randn(1, 3, 48, 48)
    fused = [one.probabilities() for one in attention_maps(model, x)]
    for block in model.blocks:
        block.attn.fused_attn = False
    again = attention_maps(model, x)
    assert [one.op for one in again] == [SDPA, SDPA] and not model.blocks[0].attn.fused_attn
    torch.testing.assert_close(fused, [one.probabilities() for one in again])


def test_heads_that_share_keys_have_probabilities_of_their_own():
    model = alive(small("gqa_vit_tiny:key_norm"))
    (first, *_) = attention_maps(model, X)
    attention, seen = model.blocks[0].attn, []
    handle = attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(X)
    handle.remove()
    q = attention.q(seen[0]).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    k = attention.k(seen[0]).unflatten(-1, (attention.kv_heads, -1))
    keys = k.transpose(1, 2)[torch.arange(2)[:, None], attention.key_heads(k)]
    expected = (q @ keys.mT * attention.scale).softmax(-1)
    torch.testing.assert_close(first.probabilities(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_channels_of_davit_attend_to_channels():
    model = alive(small("fv_davit_tiny"))
    one = next(one for one in attention_maps(model, X) if one.op == "channel_attention")
    probabilities = one.probabilities()
    assert one.query_size is None and one.positions() is None
    assert probabilities.shape == (2, one.heads, 8, 8)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, one.heads, 8))


def test_windows_know_their_place_on_the_map():
    maps = attention_maps(alive(small("fv_davit_tiny")), X)
    first = next(one for one in maps if one.op == "window_attention")
    assert (first.query_size, first.windows) == ((3, 3), (3, 4))  # 8 x 12 tokens
    places = first.positions()
    assert places.shape == (12, 9, 2) and places[5, 0].tolist() == [3, 3] and places[11, 8].tolist() == [8, 11]
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2,), num_heads=(2,))
    plain, shifted = attention_maps(model.eval(), torch.randn(1, 3, 56, 56))
    assert (plain.windows, plain.shift, shifted.shift) == ((2, 2), (0, 0), (3, 3))
    assert shifted.positions()[3, -1].tolist() == [2, 2] and plain.positions()[3, -1].tolist() == [13, 13]


def test_class_tokens_have_no_place():
    (first, *_) = attention_maps(alive(small("gqa_vit_tiny")), X)
    places = first.positions("query")
    assert first.prefix == 1 and places[0, 0].isnan().all() and places[0, 1].tolist() == [0, 0]


def test_pooled_keys_lie_between_the_tokens():
    model = alive(small("litv2_small:mixed"))
    low = next(one for one in attention_maps(model, X) if one.branch == "low" and one.key_size != one.query_size)
    assert low.positions()[0, 0].tolist() == [0.5, 0.5]


def test_a_query_beyond_the_map_and_unknown_layers_are_refused():
    model = alive(small("nat_mini"))
    (one,) = attention_maps(model, X, layers=["stages.0.blocks.0.attn"])
    with pytest.raises(ValueError, match=r"stages.0.blocks.0.attn has queries 0 to 95, got \[96\]"):
        one.probabilities([96])
    with pytest.raises(ValueError, match="saw no attention in layers stem of Nat"):
        attention_maps(model, X, layers=["stem", "stages.0.blocks.0.attn"])
    with pytest.raises(ValueError, match="saw no attention in any layer of Van"):
        attention_maps(alive(small("van_b0")), X)


def test_watching_leaves_no_hooks():
    model = alive(small("nat_mini"))
    attention_maps(model, X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
