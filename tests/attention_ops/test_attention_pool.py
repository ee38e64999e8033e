"""LAMA and GAAM against loops and recorded layers."""

import math
import zlib

import pytest
import torch

from foveate.attention_ops.attention_pool import (
    GaussianAdaptiveAttention,
    GaussianPool,
    LamaPool,
    gaussian_weights,
    lama_weights,
)


def check_gradients(grads, recorded, det):
    largest = max(l2 for l2, _ in recorded.values())
    for key, (l2, dot) in recorded.items():
        probe = torch.from_numpy(det.det_input(grads[key].shape, zlib.crc32(f"grad:{key}".encode())))
        off = max(abs(grads[key].norm() - l2), abs((grads[key] * probe).sum() - dot))
        assert off <= 1e-4 * l2 + 1e-6 * largest, key


def test_lama_equals_the_recorded_layers(det, golden):
    facts, arrays = golden("module__lama")
    assert len(facts["cases"]) == 5
    for name, case in facts["cases"].items():
        leaves = {k: w.requires_grad_() for k, w in det.det_state_dict(case["state_dict"]).items()}
        p, q = leaves.values()
        x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"]))
        lengths = torch.tensor([17, 14, 2])
        mask = torch.arange(17) < lengths[:, None] if case["ctor"]["mask"] else None
        activation, normalize = case["ctor"].get("activation", "tanh"), case["ctor"].get("normalize", True)
        weights = lama_weights(x, p, q, mask=mask, activation=activation, normalize=normalize)
        out = weights @ x if case["ctor"]["cls"] == "LAMAEncoder" else weights
        torch.testing.assert_close(out, torch.from_numpy(arrays[f"{name}__out"]), rtol=1e-4, atol=1e-6, msg=name)
        (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
        check_gradients({k: w.grad for k, w in leaves.items()}, case["grads"], det)


def test_lama_is_a_bilinear_form_of_rank_one_per_head():
    torch.manual_seed(0)
    x, p, q = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 6), (6, 3), (6, 3)))
    for b in range(2):
        context = x[b].mean(0)
        z = torch.tensor(
            [[float(torch.tanh(context @ torch.outer(p[:, h], q[:, h]) @ t)) for h in range(3)] for t in x[b]],
            dtype=torch.float64,
        )
        z = z / z.square().sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(lama_weights(x, p, q)[b], z.T.softmax(1))


def test_a_token_of_zeros_gives_no_nan():
    x = torch.randn(1, 4, 6)
    x[0, 2] = 0
    x.requires_grad_()
    pool = LamaPool(6, 2)
    out = pool(x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def official(case):
    ctor = case["ctor"]
    several = ctor["cls"].startswith("Multi")
    heads = ctor["num_heads"] if several else 1
    eps = 1e-8 if several else ctor.get("eps", 1e-8)  # several heads ignore theirs
    return GaussianAdaptiveAttention(
        ctor["norm_axis"], heads, ctor["num_gaussians"], padding=ctor.get("padding_value"), eps=eps
    )


def test_gaam_equals_the_recorded_layers(det, golden):
    facts, arrays = golden("module__gaam")
    assert len(facts["cases"]) == 5
    for name, case in facts["cases"].items():
        layer, weights = official(case), det.det_state_dict(case["state_dict"])
        leaves = {k: w.requires_grad_() for k, w in weights.items()}
        offsets = torch.stack([w for k, w in leaves.items() if k.endswith("mean_offsets")])
        widths = torch.stack([w for k, w in leaves.items() if k.endswith("c")])
        x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"]))
        if case["ctor"].get("padding_value") is not None:
            x[torch.from_numpy(det.det_input(case["input_shape"], 9)) > 0.8] = case["ctor"]["padding_value"]
        state = {"mean_offsets": offsets, "c": widths}
        found = torch.func.functional_call(layer, state, (x,))
        theirs = torch.from_numpy(arrays[f"{name}__out"])
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=2e-5 * float(theirs.std()), msg=name)
        (found * torch.from_numpy(det.det_input(found.shape, 7))).mean().backward()
        check_gradients({k: w.grad for k, w in leaves.items()}, case["grads"], det)


def test_the_weights_are_a_product_of_gaussians():
    torch.manual_seed(0)
    x, offsets = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(3).double()
    widths = torch.rand(3).double() + 0.5
    away, spread = x - x.mean(1, keepdim=True), x.var(1, keepdim=True) + 1e-8
    product = torch.ones_like(x)
    for d, c in zip(offsets, widths, strict=True):
        product = product * torch.exp(-((away - d) ** 2) / spread / (2 * c * c)) / math.sqrt(2 * math.pi * c * c)
    torch.testing.assert_close(gaussian_weights(x, offsets, widths, dim=1), product / product.sum(1, keepdim=True))


def test_a_sum_below_eps_is_clamped():
    x = torch.randn(1, 6, 1, dtype=torch.float64)
    weights = gaussian_weights(x, torch.full((20,), 9.0).double(), torch.ones(20).double(), dim=1)
    assert 0 <= float(weights.sum()) < 1e-3


def test_pooling_takes_one_token_and_many():
    for pool in (LamaPool(8, 2), GaussianPool(8, 4, 2)):
        for tokens in (1, 5):
            out = pool(torch.randn(3, tokens, 8))
            assert out.shape == (3, 8) and out.isfinite().all()
    torch.testing.assert_close(GaussianPool(8, 4)(x := torch.randn(2, 1, 8)), x[:, 0])


def test_a_constant_channel_survives_onnx(tmp_path):
    """Its variance is 0, and all that is left of the divisor is eps."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    pool, x = GaussianPool(4, 2).eval(), torch.randn(2, 5, 4)
    x[..., 1] = 0
    torch.onnx.export(pool, (x,), dynamo=True, verbose=False).save(str(tmp_path / "pool.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "pool.onnx"), providers=["CPUExecutionProvider"])
    [out] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), pool(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LamaPool(8, 1), "LamaPool: wanted at least 2 heads"),
        (lambda: GaussianPool(8, 3), "GaussianPool: heads must divide dim 8"),
        (lambda: GaussianAdaptiveAttention(1, 0), "heads, gaussians must be 1 or more, got 0, 3"),
        (lambda: GaussianAdaptiveAttention(1, 5)(torch.zeros(1, 4)), "axis 1 has 4 entries for 5 heads"),
        (lambda: lama_weights(torch.zeros(1, 2, 3), torch.zeros(4, 2), torch.zeros(4, 2)), "wanted x .B, N, D. and p"),
        (
            lambda: lama_weights(torch.zeros(1, 2, 3), *torch.zeros(2, 3, 2), activation="relu"),
            "activation must be 'tanh' or None",
        ),
        (
            lambda: lama_weights(torch.zeros(1, 2, 3), *torch.zeros(2, 3, 2), mask=torch.ones(1, 2)),
            r"mask must be \(1, 2\) bool",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
