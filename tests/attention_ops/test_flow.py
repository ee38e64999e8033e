"""Flow-Attention against the authors' outputs, and bad callers."""

import pytest
import recorded
import torch
from torch import nn

from foveate.attention_ops import FlowAttention, flow_attention


class Core(nn.Module):
    """The authors' general layer: projections of their own for queries, keys and values."""

    def __init__(self, dim: int, heads: int, form: str, queries: int | None) -> None:
        super().__init__()
        self.heads, self.form, self.queries = heads, form, queries
        names = ("query_projection", "key_projection", "value_projection", "out_projection")
        for name in names:
            setattr(self, name, nn.Linear(dim, dim))

    def forward(self, x):
        of_q, of_k = (x, x) if self.queries is None else (x[:, : self.queries], x[:, self.queries :])
        q, k, v = self.query_projection(of_q), self.key_projection(of_k), self.value_projection(of_k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        return self.out_projection(flow_attention(q, k, v, form=self.form).flatten(2))


def layer(name: str, case: dict) -> nn.Module:
    ctor = case["ctor"]
    if name.startswith("cv"):
        return FlowAttention(ctor["dim"], ctor["num_heads"], map_size=(1, 1))
    form = "causal" if name.startswith("causal") else "core"
    return Core(ctor["d_model"], ctor["n_heads"], form, 30 if "cross" in name else None)


def test_layers_equal_the_authors_with_every_gradient(det, golden):
    cases, arrays = golden("module__flow")
    assert {name.partition("_")[0] for name in cases} == {"cv", "core", "causal"}
    for name, case in cases.items():
        net = recorded.load(layer(name, case), case, det)
        x = recorded.given(case, det).requires_grad_()
        out = net(x, (1, x.shape[1])) if name.startswith("cv") else net(x)
        assert recorded.off(out, arrays[f"{name}__out"]) < 2e-5, name
        recorded.backward(out, det)
        assert recorded.wrong_gradients({n: p.grad for n, p in net.named_parameters()}, case, det) == [], name


def test_thousands_of_tokens_of_half_precision_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4096, 2, 8, generator=generator) for _ in range(3))
    exact = flow_attention(q.double(), k.double(), v.double())
    for dtype in (torch.float16, torch.bfloat16):
        out = flow_attention(q.to(dtype), k.to(dtype), v.to(dtype))
        wanted = flow_attention(*(t.to(dtype).double() for t in (q, k, v)))
        assert (out.double() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_causal_query_does_not_depend_on_later_keys():
    x = torch.randn(1, 150, 2, 4, dtype=torch.float64)
    later = x.clone()
    later[:, 100:] += 1
    for impl in ("tiled", "reference"):
        before, after = (flow_attention(t, t, t, form="causal", impl=impl) for t in (x, later))
        torch.testing.assert_close(before[:, :100], after[:, :100])
        assert (before[:, 100:] != after[:, 100:]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"form": "best"}, "form must be one of .* got 'best'"),
        ({"q": torch.zeros(2, 5, 8)}, r"q must be \(B, Nq, heads, head_dim\), got shape \(2, 5, 8\)"),
        ({"k": torch.zeros(2, 5, 3, 8)}, r"k must be \(2, 'Nk', 2, 8\) as q, got \(2, 5, 3, 8\)"),
        ({"v": torch.zeros(2, 4, 2, 8)}, r"v must be \(2, 5, 2, 'value_dim'\) as k, got \(2, 4, 2, 8\)"),
        ({"q": torch.zeros(2, 4, 2, 8), "form": "causal"}, "the causal form needs as many keys as queries 4, got 5"),
    ],
)
def test_bad_input_is_refused_by_name(changes, words):
    zeros = torch.zeros(2, 5, 2, 8)
    with pytest.raises(ValueError, match=f"flow_attention: {words}"):
        flow_attention(**{"q": zeros, "k": zeros, "v": zeros} | changes)
