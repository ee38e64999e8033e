"""Kernelized attention against a dense restatement of the paper; Fourier transforms against products."""

import pytest
import recorded
import torch

from foveate.attention_ops import KernelizedAttention, kernelized_attention
from foveate.attention_ops.kernelized import takes_fft


def layer(case: dict, form: str = "auto") -> tuple[KernelizedAttention, tuple[int, int]]:
    ctor = case["ctor"]
    size = (1, *ctor["size"]) if len(ctor["size"]) == 1 else tuple(ctor["size"])
    net = KernelizedAttention(
        ctor["dim"], ctor["heads"], map_size=size, features=ctor["features"], relative=ctor["rpe"],
        normalize=ctor["normalized"], form=form,
    )  # fmt: skip
    return net, size


@pytest.mark.parametrize("form", ["dense", "fft"])
def test_layers_equal_the_recorded_ones_with_every_gradient(det, golden, form):
    cases, arrays = golden("module__nprf_paper")
    for name, case in cases.items():
        net, size = layer(case, form)
        recorded.load(net, case, det)
        out = net(recorded.given(case, det), size)
        assert recorded.off(out, arrays[f"{name}__out"]) < 2e-5, name
        recorded.backward(out, det)
        assert recorded.wrong_gradients({n: p.grad for n, p in net.named_parameters()}, case, det) == [], name


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_transforms_keep_the_digits_of_small_weights_beside_large_ones(spread):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 35, 2, 8, generator=generator) for _ in range(3))
    omega, rel = torch.randn(8, 8, generator=generator), torch.randn(2, 9, 13, generator=generator) * spread
    exact = kernelized_attention(q.double(), k.double(), v.double(), omega, (5, 7), rel=rel, impl="reference")
    for form in ("dense", "fft"):
        out = kernelized_attention(q, k, v, omega, (5, 7), rel=rel, form=form)
        assert (out - exact).abs().max() < 2e-5 * exact.std(), form


def test_transforms_are_taken_for_long_sequences_only():
    assert not takes_fft("auto", (14, 14), 32, 64) and takes_fft("auto", (1, 1 << 16), 32, 64)
    assert takes_fft("fft", (2, 2), 1, 1) and not takes_fft("dense", (512, 512), 32, 64)


def test_a_smaller_map_takes_the_middle_of_the_table_and_a_larger_one_is_refused():
    torch.manual_seed(0)
    net = KernelizedAttention(8, 2, map_size=(4, 5), prefix_tokens=1, features=4)
    torch.nn.init.normal_(net.rel)
    table = net.table((3, 2))
    assert table.shape == (2, 5, 3)
    whole = net.rel.T.unflatten(1, (7, 9))
    assert torch.equal(table[:, 2, 1], whole[:, 3, 4])  # no distance
    assert net(torch.randn(2, 7, 8), (3, 2)).shape == (2, 7, 8)
    with pytest.raises(ValueError, match="its table of positions is that of maps up to 4 x 5, got 5 x 5"):
        net(torch.randn(2, 26, 8), (5, 5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"form": "best"}, "form must be one of"),
        ({"size": (2, 4)}, r"prefix_tokens \+ H \* W must be 6 tokens, got 0, \(2, 4\)"),
        ({"omega": torch.zeros(4, 7)}, r"omega must be \(features, 8\), got \(4, 7\)"),
        (
            {"rel": torch.zeros(2, 3, 4)},
            r"rel must be \(heads, 2 \* H - 1, 2 \* W - 1\) = \(2, 3, 5\), got \(2, 3, 4\)",
        ),
    ],
)
def test_bad_input_is_refused_by_name(changes, words):
    zeros = torch.zeros(1, 6, 2, 8)
    with pytest.raises(ValueError, match=f"kernelized_attention: {words}"):
        kernelized_attention(
            **{"q": zeros, "k": zeros, "v": zeros, "omega": torch.zeros(4, 8), "size": (2, 3)} | changes
        )
