"""Layers and losses of the quantizable, sparsified and dependency ViTs against recorded ones of the authors' code."""

import zlib

import numpy as np
import pytest
import timm
import torch
from torch import nn

from foveate.attention_ops._clip import clipped, read_clip
from foveate.attention_ops.gated import GatedAttention
from foveate.attention_ops.reversed import MessageAttention
from foveate.attention_ops.sparsified import MaskPredictor, SparsifiedAttention, keep_tokens, share_of, take_tokens
from foveate.backbones.dependencyvit import DependencyBlock, tokens_left
from foveate.backbones.sparsifiner import class_scores
from foveate.backbones.sparsifiner_phases import distillation_loss, reconstruction_loss, train_phase
from foveate.export.simulate import (
    OUTLIER_FREE,
    ActivationQuantizer,
    asymmetric_grid,
    percentile_range,
    quantized,
    symmetric_grid,
    weight_grid,
)


def close(ours, theirs, tolerance=5e-5):
    """Compare in standard deviations of the recorded array, whole or sampled."""
    flat = ours.detach().contiguous().flatten().numpy()
    theirs = np.ravel(theirs)
    at = np.linspace(0, flat.size - 1, theirs.size).astype(int)
    return np.abs(flat[at].astype(np.float64) - theirs).max() <= tolerance * max(theirs.std(), 1e-12)


def assert_gradients(parameters, recorded, det):
    for key, (norm, dot) in recorded.items():
        grad = parameters[key].grad
        probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{key}".encode())))
        assert abs(grad.norm() - norm) <= 1e-4 * norm + 1e-12, key
        assert abs((grad * probe).sum() - dot) <= 1e-4 * norm + 1e-12, key


def backward(out, det):
    (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()


def given(case, det):
    return [torch.from_numpy(det.det_input(shape, seed)) for shape, seed in case["inputs"]]


def load(layer, case, det, prefix=""):
    weights = det.det_state_dict(case["state_dict"], case.get("mul"))
    layer.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items()})
    return layer.eval()


@pytest.mark.parametrize("name", ["vanilla", "m.003_1", "0_1.01", "m.01_1.01"])
def test_clipped_softmax(name, det, golden):
    cases, arrays = golden("module__outlierfree")
    case, name = cases["cases"][f"softmax_{name}"], f"softmax_{name}"
    x = (given(case, det)[0] * 4.0).requires_grad_()
    clip = read_clip("layer", case["ctor"].get("key", "vanilla"), None, 17)
    assert clip == (None if "key" not in case["ctor"] else (case["ctor"]["gamma"], case["ctor"]["zeta"]))
    out = clipped(x.softmax(-1), clip)
    assert close(out, arrays[f"{name}__out"])
    assert np.array_equal(out.detach() == 0, arrays[f"{name}__zeros"].astype(bool))
    backward(out, det)
    assert abs(x.grad.norm() - case["grad_in"]["l2"]) <= 1e-4 * case["grad_in"]["l2"]


GATED = {
    "attn_cs": {"softmax_clip": (-0.03, 1.0)},
    "attn_cs_alpha4_T50": {"clip_alpha": 4, "map_size": (7, 7), "prefix_tokens": 1},
    "attn_gate_unconditional": {"gate": "unconditional"},
    "attn_gate_per_head": {"gate": "per_head"},
    "attn_gate_linear": {"gate": "linear"},
    "attn_gate_mlp": {"gate": "mlp"},
    "attn_gate_all": {"gate": "all"},
    "attn_gate_linear_finetune": {"gate": "linear", "gate_finetune": True},
}


@pytest.mark.parametrize("name", GATED)
def test_gated_attention(name, det, golden):
    facts, arrays = golden("module__outlierfree")
    case = facts["cases"][name]
    layer = load(GatedAttention(case["ctor"]["dim"], case["ctor"]["num_heads"], **GATED[name]), case, det)
    [x] = given(case, det)
    contexts = []
    layer.proj.register_forward_pre_hook(lambda _, args: contexts.append(args[0]))
    out = layer(x)
    assert close(out, arrays[f"{name}__out"]) and close(contexts[0], arrays[f"{name}__context"])
    backward(out, det)
    assert_gradients(dict(layer.named_parameters()), case["grads"], det)


def test_every_recorded_attention_is_tried(golden):
    cases = golden("module__outlierfree")[0]["cases"]
    assert {name for name in cases if name.startswith("attn")} == set(GATED)


def calibration(det):
    return [torch.from_numpy(det.det_input((2, 17, 48), s)) * (1 + 0.5 * s) + 0.3 for s in range(3)]


def test_ranges_of_activations(det, golden):
    facts, arrays = golden("module__outlierfree")
    recorded = facts["quantiser"]["act_asymmetric_running_minmax_3_batches"]
    quantize = ActivationQuantizer(OUTLIER_FREE)
    for batch in calibration(det):
        quantize(batch)
    grid = quantize.grid
    assert float(quantize.least) == pytest.approx(recorded["x_min"], rel=1e-6)
    assert float(quantize.most) == pytest.approx(recorded["x_max"], rel=1e-6)
    assert float(grid.scale) == pytest.approx(recorded["scale"], rel=1e-6)
    assert (float(grid.zero_point), grid.low, grid.high) == (recorded["zero_point"], 0, 255)
    x = calibration(det)[2]
    assert np.array_equal(grid.integers(x).numpy(), arrays["quant_act__int"])
    np.testing.assert_allclose(grid(x).numpy(), arrays["quant_act__dequant"], rtol=1e-6, atol=1e-6)
    low, high = percentile_range(calibration(det)[0], 99.9)
    recorded = facts["quantiser"]["act_percentile_99.9"]
    assert (low, high) == pytest.approx((recorded["x_min"], recorded["x_max"]), rel=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("estimator", ["minmax", "mse"])
def test_grids_of_weights(estimator, bits, det, golden):
    facts, arrays = golden("module__outlierfree")
    name = f"weight_symmetric_{estimator}_{bits}"
    weight = torch.from_numpy(det.det_tensor("w.weight", (24, 32)))
    grid, recorded = weight_grid(weight, bits, estimator), facts["quantiser"][name]
    assert float(grid.scale) == pytest.approx(recorded["scale"], rel=1e-6)
    assert (grid.low, grid.high) == (recorded["int_min"], recorded["int_max"])
    assert np.array_equal(grid.integers(weight).numpy(), arrays[f"quant_{name}__int"])
    assert float((grid(weight) - weight).square().mean()) == pytest.approx(recorded["mse"], rel=1e-4)


def test_other_grids(det, golden):
    facts, arrays = golden("module__outlierfree")
    weight = torch.from_numpy(det.det_tensor("w.weight", (24, 32)))
    grid, recorded = asymmetric_grid(weight.min(), weight.max()), facts["quantiser"]["weight_asymmetric_minmax_8"]
    assert float(grid.scale) == pytest.approx(recorded["scale"], rel=1e-6)
    assert np.array_equal(grid.integers(weight).numpy(), arrays["quant_weight_asymmetric_minmax_8__int"])
    grid, recorded = symmetric_grid(weight.abs().min(), weight.max()), facts["quantiser"]["symmetric_nonnegative_input"]
    assert float(grid.scale) == pytest.approx(recorded["scale"], rel=1e-6)
    assert (grid.low, grid.high) == (0, 255)


def simulated(layer, batches):
    """Observe three batches, fix the ranges, and run the first one."""
    copy, end = quantized(layer, OUTLIER_FREE)
    run = getattr(copy, "attend", copy)  # the recorded attention has no output projection
    with torch.no_grad():
        for batch in batches:
            run(batch)
        end()
        return copy, run(batches[0])


W8A8 = {"vanilla": {}, "clipped": {"softmax_clip": (-0.03, 1.0)}, "gated": {"gate": "linear"}}


@pytest.mark.parametrize("kind", W8A8)
def test_simulated_int8_attention(kind, det, golden):
    facts, arrays = golden("module__outlierfree")
    recorded = facts["quantiser"][f"w8a8_attention_{kind}"]
    weights = det.det_state_dict(recorded["state_dict"])
    layer = GatedAttention(48, 3, **W8A8[kind])
    parts = {part: [weights.pop(f"{name}.{part}") for name in ("query", "key", "value")] for part in ("weight", "bias")}
    weights |= {f"qkv.{part}": torch.cat(three) for part, three in parts.items()}
    layer.load_state_dict(weights | {k: v for k, v in layer.state_dict().items() if k.startswith("proj")})
    copy, out = simulated(layer, [batch * 0.5 for batch in calibration(det)])
    assert float(copy.attention.qkv.outputs[0].grid.scale) == pytest.approx(
        recorded["ranges"]["query.activation_quantizer"]["scale"], rel=1e-6
    )
    assert_equal_but_for_ties(out, arrays[f"quant_w8a8_attention_{kind}__out"], copy.context.grid.scale)


def assert_equal_but_for_ties(out, theirs, scale):
    """Equal integers: a number that lies between two of them within float32 may fall to either side."""
    steps = np.abs(out.numpy() - theirs) / float(scale)
    assert steps.max() <= 1.01 and (steps > 0.01).mean() <= 2e-3


def test_simulated_int8_mlp_and_norm(det, golden):
    facts, arrays = golden("module__outlierfree")
    mlp = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))
    mlp.load_state_dict(det.det_state_dict(facts["quantiser"]["w8a8_mlp"]["state_dict"]))
    copy, out = simulated(mlp, calibration(det))
    assert_equal_but_for_ties(out, arrays["quant_w8a8_mlp__out"], copy[2].outputs[0].grid.scale)
    norm = nn.LayerNorm(48)
    norm.load_state_dict(det.det_state_dict(facts["quantiser"]["w8a8_layernorm"]["state_dict"]))
    copy, out = simulated(norm, calibration(det))
    assert_equal_but_for_ties(out, arrays["quant_w8a8_layernorm__out"], copy.output.grid.scale)


PREDICTORS = {
    "predictor_eval_top8_topk": {},
    "predictor_eval_threshold_coef": {"top": None},
    "predictor_eval_threshold_mask": {"score_floor": 0.05},
    "predictor_eval_share": {"shares_tables": True},
    "predictor_train_recon": {},
}


def predictor(name, case, det, **options):
    layer = MaskPredictor(48, 3, map_size=(9, 9), **options)
    return load(layer, case, det)


@pytest.mark.parametrize("name", PREDICTORS)
def test_predicted_scores_and_masks(name, det, golden):
    facts, arrays = golden("module__sparsifiner")
    case = facts["cases"][name]
    layer, (q, k) = predictor(name, case, det, **PREDICTORS[name]), given(case, det)
    out = layer(q, k, size=(9, 9))
    if name == "predictor_train_recon":
        out = layer.approximate(q, k, (9, 9))
    assert close(out, arrays[f"{name}__out__samples4096"])
    mask = layer.mask(out, share_of(82, case["ctor"]["attn_keep_rate"]))
    assert np.array_equal(mask.numpy(), arrays[f"{name}__mask"].astype(bool))
    backward(out, det)
    names = {"proj_n": "proj_back_n"} if "share" in name else {}
    grads = {names.get(key, key): value for key, value in case["grads"].items()}
    parameters = dict(layer.named_parameters(remove_duplicate=False))
    assert_gradients(parameters, {k: v for k, v in grads.items() if k not in names.values()} | {}, det)


def test_predicted_scores_of_the_tokens_that_are_left(det, golden):
    facts, arrays = golden("module__sparsifiner")
    name = "predictor_eval_tokens"
    case = facts["cases"][name]
    layer, (q, k) = predictor(name, case, det), given(case, det)
    left = torch.from_numpy(arrays[f"{name}__token_mask"].astype(bool))[0].nonzero()[:, 0]
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), left + 1])
    out = layer(q[:, :, rows], k[:, :, rows], size=(9, 9), numbers=left[None])
    whole = torch.zeros(1, 3, 81, 82)
    whole[:, :, left[:, None], rows] = out
    theirs = arrays[f"{name}__out__samples4096"]
    at = np.linspace(0, whole.numel() - 1, theirs.size).astype(int)
    of_left = np.isin(at % 82, rows)  # theirs scores hidden keys too, and hides them afterwards
    assert np.abs(whole.detach().flatten().numpy()[at] - theirs)[of_left].max() <= 5e-5 * theirs.std()
    mask = torch.zeros(1, 3, 82, 82, dtype=torch.bool)
    mask[:, :, (left + 1)[:, None], rows] = layer.mask(out, min(share_of(82, 0.5), len(left)))[:, :, 1:]
    mask[:, :, 0] = True
    assert np.array_equal(mask.numpy(), arrays[f"{name}__mask"].astype(bool))


@pytest.mark.parametrize("name", ["attention_82", "attention_prune"])
def test_sparsified_attention(name, det, golden):
    facts, arrays = golden("module__sparsifiner")
    case = facts["cases"][name]
    layer = load(SparsifiedAttention(48, 3, map_size=(9, 9), prefix_tokens=1, keep=0.25), case, det)
    [x] = given(case, det)
    out = layer(x, size=(9, 9))
    assert close(out, arrays[f"{name}__out"])
    backward(out, det)
    assert_gradients(dict(layer.named_parameters()), case["grads"], det)
    assert not any(layer.get_parameter(key).grad.any() for key in case["grads_none"])
    if name == "attention_prune":
        q, k, _ = layer.project(x)
        chosen = keep_tokens(class_scores(q[:, :1], k, layer.scale, 0), share_of(81, 0.7))
        assert torch.equal(chosen[0], torch.from_numpy(arrays[f"{name}__token_mask"][0].astype(bool)).nonzero()[:, 0])


@pytest.fixture
def student_and_teacher(det, golden):
    facts = golden("module__sparsifiner")[0]["training_losses"]
    sizes = {"embed_dim": 48, "num_heads": 3, "depth": 3, "img_size": (128, 144), "num_classes": 10}
    student = timm.create_model("sparsifiner_deit_tiny", **sizes)
    student.load_state_dict(det.det_state_dict(facts["model"]["state_dict"], facts["model"]["mul"]))
    teacher = timm.create_model("deit_tiny_patch16_224", **sizes).eval()
    weights = [[f"teacher.{key}", *rest] for key, *rest in facts["model"]["teacher_state_dict"]]
    teacher.load_state_dict({k.removeprefix("teacher."): v for k, v in det.det_state_dict(weights).items()})
    return facts, student, teacher, torch.from_numpy(det.det_input((2, 3, 128, 144), 11))


def test_the_loss_of_phase_1_and_its_gradients(student_and_teacher, det):
    facts, student, teacher, images = student_and_teacher
    recorded = facts["phase1_attention_reconstruction"]
    loss = reconstruction_loss(student, teacher, images)
    assert loss.item() == pytest.approx(recorded["loss"], rel=1e-5)
    loss.backward()
    wanted = {k: v for k, v in recorded["grads"].items() if v is not None and v[0]}
    assert any("mask_predictor" in key for key in wanted)
    assert_gradients(dict(student.named_parameters()), wanted, det)


def test_the_loss_of_phase_2_and_its_gradients(student_and_teacher, det):
    facts, student, teacher, images = student_and_teacher
    recorded = facts["phase2_distillation"]
    loss = distillation_loss(student, teacher, images, torch.tensor([3, 7]))
    parts = [recorded["components"][f"{part}_loss"] for part in ("cls", "cls_distill", "token_distill")]
    assert [part.item() for part in loss] == pytest.approx(parts, rel=1e-5)
    assert loss.total.item() == pytest.approx(recorded["loss"], rel=1e-5)
    loss.total.backward()
    wanted = {k: v for k, v in recorded["grads"].items() if v is not None and v[0]}
    assert_gradients(dict(student.named_parameters()), wanted, det)


def test_phases_train_predictors_and_then_all_else(student_and_teacher):
    _, student, teacher, images = student_and_teacher
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for phase in (1, 2):
        optimizer = torch.optim.AdamW(train_phase(student, phase), lr=1e-3)
        loss = (
            reconstruction_loss(student, teacher, images)
            if phase == 1
            else distillation_loss(student, teacher, images, torch.tensor([3, 7])).total
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
        assert moved and all(("mask_predictor" in name) == (phase == 1) for name in moved)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
    with pytest.raises(ValueError, match=r"phase must be 1 \(predictors\) or 2 \(backbone\), got 3"):
        train_phase(student, 3)


@pytest.mark.parametrize("name", ["reversed_48_h3", "reversed_48_h12"])
def test_reversed_attention(name, det, golden):
    facts, arrays = golden("module__dependencyvit")
    case = facts["cases"][name]
    layer = load(MessageAttention(48, case["ctor"]["num_heads"]), case, det)
    x, *before = given(case, det)
    before = before[0].sigmoid() if before else torch.ones(x.shape[:2])
    out, m = layer(x, before)
    assert close(out, arrays[f"{name}__out"]) and close(m, arrays[f"{name}__m"])
    assert close(m, arrays[f"{name}__prune_score"])
    assert close(layer.dependency_mask(x, before), arrays[f"{name}__dependency_mask"])
    backward(out, det)
    assert_gradients(dict(layer.named_parameters()), case["grads"], det)


@pytest.mark.parametrize(("name", "step"), [("pruner_1_196", 1), ("pruner_4_49", 4)])
def test_tokens_that_are_left(name, step, det, golden):
    facts, arrays = golden("module__dependencyvit")
    x, scores = given(facts["cases"][name], det)
    scores = scores.sigmoid()
    count = tokens_left(x.shape[1], step)
    assert count == arrays[f"{name}__out"].shape[1]
    chosen = keep_tokens(scores, count)
    order = scores.gather(1, chosen).argsort(1, descending=True)
    assert close(take_tokens(x, chosen.gather(1, order)), arrays[f"{name}__out"])


@pytest.mark.parametrize("name", ["block_plain", "block_peg_5x7"])
def test_dependency_blocks(name, det, golden):
    facts, arrays = golden("module__dependencyvit")
    case, encodes = facts["cases"][name], name != "block_plain"
    block = DependencyBlock(encodes, MessageAttention(48, 3), 48, 4.0, init_values=1e-6)
    load(block, case, det, prefix="b.")
    [x] = given(case, det)
    tokens = x.flatten(2).transpose(1, 2) if encodes else x
    size = (5, 7) if encodes else (4, 4)
    out, m = block(tokens, torch.ones(tokens.shape[:2]), size)
    out = out.transpose(1, 2).unflatten(2, size) if encodes else out
    assert close(out, arrays[f"{name}__out"]) and close(m, arrays[f"{name}__m"])
    backward(out, det)
    assert_gradients({f"b.{k}": p for k, p in block.named_parameters()}, case["grads"], det)
