"""Other token mixers in timm's ViTs, DeiTs and Swins."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

import foveate
from foveate.attention_ops import AgentAttention, insert_attention
from foveate.attention_ops.mixers import MIXERS, register_mixer
from foveate.attention_ops.reattend import MapMixer

VIT: dict[str, Any] = {"img_size": 64, "depth": 3, "num_classes": 5}
SWIN = {"img_size": 112, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "num_classes": 5}
MODELS = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def made(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **MODELS[name]).eval()
    px = MODELS[name]["img_size"]
    return model, torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(1))


@every_model
def test_every_block_gets_the_mixer_with_the_weights_of_attention(name):
    model, x = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model(x)
    assert foveate.reattend(model, "agent", agents=4) is model
    mixers = {path: m for path, m in model.named_modules() if isinstance(m, MapMixer)}
    assert len(mixers) == sum(key.endswith("attn.qkv.weight") for key in before)
    for path, module in mixers.items():
        assert isinstance(module.mixer, AgentAttention) and not module.training
        for layer in ("qkv", "proj"):
            for part in ("weight", "bias"):
                old = before[f"{path}.{layer}.{part}"]
                assert torch.equal(getattr(getattr(module.mixer, layer), part), old)
    out = model(x)
    assert out.shape == plain.shape and not torch.allclose(out, plain)
    model.train()(x).square().sum().backward()
    trained = [p for m in mixers.values() for p in m.mixer.parameters() if p.dim() > 1]
    assert all(p.grad is not None for p in trained) and any(p.grad.any() for p in trained)


def test_in_a_swin_the_mixer_sees_the_whole_map():
    model, x = made("swin_tiny_patch4_window7_224")
    foveate.reattend(model, "agent", agents=4)
    sizes = [m.map_size for m in model.modules() if isinstance(m, MapMixer)]
    assert sizes == [(28, 28)] * 2 + [(14, 14)] * 2
    block, seen = model.layers[0].blocks[1], torch.randn(1, 28, 28, 16, requires_grad=True)  # a shifted one before
    block(seen)[0, 0, 0].sum().backward()
    assert (seen.grad.abs().sum(-1) > 0).all()
    assert model(x).isfinite().all()


def test_some_blocks_only():
    model, x = made("vit_tiny_patch16_224")
    foveate.reattend(model, "agent", blocks=(0, -1), agents=9)
    assert [isinstance(block.attn, MapMixer) for block in model.blocks] == [True, False, True]
    assert model(x).shape == (2, 5)


def test_frozen_weights_dtype_and_mode_are_kept():
    model, _ = made("vit_tiny_patch16_224")
    model = model.to(torch.bfloat16).train()
    model.blocks[0].attn.qkv.requires_grad_(False)
    foveate.reattend(model, "agent", agents=4)
    mixer = model.blocks[0].attn.mixer
    assert mixer.dwc.weight.dtype == torch.bfloat16 and mixer.training
    assert not mixer.qkv.weight.requires_grad and mixer.proj.weight.requires_grad


def test_insert_attention_takes_mixers_too():
    model, x = made("vit_tiny_patch16_224")
    insert_attention(model, "agent", agents=4)
    assert all(isinstance(block.attn, MapMixer) for block in model.blocks) and model(x).shape == (2, 5)


def test_a_mixer_of_ones_own_without_projections():
    class Means(nn.Module):
        def __init__(self, dim, num_heads, *, map_size, prefix_tokens=0, qkv_bias=True):
            super().__init__()
            self.place = (dim, num_heads, map_size, prefix_tokens, qkv_bias)

        def forward(self, x, size):
            assert x.shape[1] == self.place[3] + size[0] * size[1]
            return x.mean(1, keepdim=True).expand_as(x)

    register_mixer("means of a test")(Means)
    try:
        model, x = made("deit_tiny_distilled_patch16_224")
        foveate.reattend(model, "means of a test")
        assert model.blocks[0].attn.mixer.place == (192, 3, (4, 4), 2, True)
        assert model(x).shape == (2, 5)
    finally:
        MIXERS.pop("means of a test")


def test_an_invalid_request_is_refused_and_changes_nothing():
    model, _ = made("vit_tiny_patch16_224")
    refused = [
        ({"mixer": "agents"}, r"wanted one of .*agent.*, got 'agents'"),
        ({"mixer": "agent", "agents": 12}, "agents must be a square number"),
        ({"mixer": "agent", "agent": 9}, "unexpected keyword argument 'agent'"),
        ({"mixer": "agent", "blocks": (3,)}, "blocks must be -3 to 2, got 3"),
    ]
    for arguments, words in refused:
        with pytest.raises(ValueError, match=words):
            foveate.reattend(model, **arguments)
    assert not any(isinstance(m, MapMixer) for m in model.modules())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(2, 2), "Linear has no blocks with attn.qkv"),
        (lambda: timm.create_model("vit_tiny_patch16_224", **VIT, dynamic_img_size=True), "images of any size"),
        (lambda: timm.create_model("vit_tiny_patch16_224", **VIT, qk_norm=True), "Attention has q_norm"),
    ],
    ids=["no attention", "any size", "normalized q and k"],
)
def test_models_that_cannot_take_a_mixer_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        foveate.reattend(make(), "agent")


def test_a_mask_is_refused_when_the_block_is_called():
    model, _ = made("vit_tiny_patch16_224")
    foveate.reattend(model, "agent", agents=4)
    with pytest.raises(ValueError, match="takes no mask"):
        model.blocks[0](torch.zeros(1, 17, 192), attn_mask=torch.zeros(17, 17))


@every_model
def test_a_model_with_a_mixer_is_exported(name, tmp_path):
    pytest.importorskip("onnxscript")
    from foveate.export import export_onnx, verify

    model, x = made(name)
    foveate.reattend(model, "agent", agents=4)
    file = export_onnx(model, tmp_path / "net.onnx", example=x)
    assert verify(model, file, torch.cat([x, x])).top1 == 1
