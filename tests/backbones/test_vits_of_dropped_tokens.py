"""ViTs that drop tokens, and options of the other plain ViTs that only they have."""

import pytest
import timm
import torch
from small_models import VIT, alive, small

from foveate.attention_ops.sparsified import MaskPredictor
from foveate.backbones.sparsifiner_phases import attention_matrices, reconstruction_loss

LITE = {**VIT, "depth": 3, "pruning_blocks": (1, 2)}
PRUNED = {**VIT, "depth": 3, "pruning_blocks": (0, 1), "token_rate": 0.7}
KINDS = {"dependencyvit_lite_tiny": LITE, "sparsifiner_deit_tiny": PRUNED}
every_kind = pytest.mark.parametrize("name", KINDS)
X = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))


def make(name, **kwargs):
    torch.manual_seed(0)
    return alive(timm.create_model(name, num_classes=5, **{**KINDS[name], **kwargs}))


def tokens_of_blocks(model, x):
    seen = []
    handles = [block.register_forward_hook(lambda _, args, out: seen.append(out[0].shape[1])) for block in model.blocks]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_tokens_are_really_dropped():
    assert tokens_of_blocks(make("sparsifiner_deit_tiny"), X) == [1 + 17, 1 + 12, 1 + 12]  # of 24: 0.7, 0.49
    assert tokens_of_blocks(make("dependencyvit_lite_tiny"), X) == [24, 20, 16]  # 16 % of all at each


@every_kind
def test_maps_have_zeros_where_tokens_were_dropped(name):
    model = make(name)
    with torch.no_grad():
        features, maps = model.forward_intermediates(X)
    assert [tuple(x.shape) for x in maps] == [(2, 32, 4, 6)] * 3
    left = [int(x.any(1).flatten(1).sum(1)[0]) for x in maps]
    prefix = model.num_prefix_tokens
    assert left == [count - prefix for count in tokens_of_blocks(model, X)]
    torch.testing.assert_close(features, model.forward_features(X).detach())


@every_kind
def test_they_script_compile_and_export(name):
    model = make(name)
    expected = model(X).detach()
    torch.testing.assert_close(torch.jit.script(model)(X), expected)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)


@every_kind
def test_every_parameter_learns_and_checkpointing_changes_nothing(name):
    grads = []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        model(X).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_another_image_size_resamples_positions_and_the_predictors_tables():
    model = make("sparsifiner_deit_tiny")
    model.set_input_size((32, 48))
    assert all(m.proj_n.shape == (25, 2) for m in model.modules() if isinstance(m, MaskPredictor))
    assert model(X).isfinite().all()
    twin = make("sparsifiner_deit_tiny")
    torch.testing.assert_close(model(X), twin(X), rtol=1e-4, atol=1e-4)


def test_weights_of_timms_vit_load_and_gates_keep_their_first_values(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    overlay = {"file": str(tmp_path / "vit.pth")}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    plain = timm.create_model("quantizable_vit_tiny", **options).eval()
    gated = timm.create_model("quantizable_vit_tiny", gate="linear", gate_finetune=True, **options).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.eval()(x)
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)
        assert (gated(x) - expected).std() < 0.05 * expected.std()  # gates start near 1
        sparse = timm.create_model("sparsifiner_deit_tiny", keep=1.0, **options).eval()
        torch.testing.assert_close(sparse(x), expected, rtol=1e-4, atol=1e-4)  # every key is kept


def test_gates_start_at_gate_init():
    for init in (0.5, 0.8):
        model = small("quantizable_vit_tiny", gate_init=init)
        gates = model.blocks[0].attn.gates(torch.zeros(1, 4, 32))
        torch.testing.assert_close(gates, torch.full((1, 4, 2), init))


def test_teachers_of_other_kinds_are_refused():
    student = small("sparsifiner_deit_tiny")
    teacher = timm.create_model("deit_tiny_patch16_224", patch_size=8, img_size=32, embed_dim=32, depth=3, num_heads=2)
    with pytest.raises(ValueError, match=r"the teacher's matrices must be 2 of \(2, 2, 16, 17\), got 3 of"):
        reconstruction_loss(student, teacher, X[..., :32])
    with pytest.raises(ValueError, match="ResNet has no blocks with an attention as in timm's ViT"):
        attention_matrices(timm.create_model("test_resnet"), X)
