"""Models that take images of one size: they refuse others, and move to another size with their tables resampled."""

import copy

import pytest
import timm
import torch
from small_models import FIXED, alive, small

import foveate
from foveate.export import ExportError, export_onnx, export_program, verify

every_fixed = pytest.mark.parametrize("name", FIXED)


def images(name: str, batch: int = 2) -> torch.Tensor:
    size = FIXED[name]["img_size"]
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2))


@every_fixed
def test_other_sizes_are_refused_in_one_line(name):
    model = small(name).eval()
    assert model(images(name)).shape == (2, 1000)
    for shape in ((40, 32), (64, 64), (32, 41)):
        with pytest.raises(ValueError, match=rf"this model takes images of 32 x 40 px \(img_size\), got {shape[0]} x"):
            model(torch.zeros(1, 3, *shape))
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\) with sides of at least"):
        model(torch.zeros(3, 32, 40))


@every_fixed
def test_the_size_may_change_later(name):
    model = small(name).eval()
    with torch.no_grad():
        model.set_input_size((48, 32))
        moved = model(torch.randn(1, 3, 48, 32))
    assert moved.isfinite().all() and model.stem.pos_embed.shape[1:3] == (12, 8)
    with pytest.raises(ValueError, match=r"img_size must be multiples of 8 px, got \(30, 32\)"):
        model.set_input_size((30, 32))


@every_fixed
def test_weights_of_another_size_load_with_tables_resampled(name, tmp_path):
    model = alive(small(name, img_size=32))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    kwargs = {**FIXED[name], "img_size": (48, 32)}
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    table, wanted = other.stem.pos_embed, model.stem.pos_embed.permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(wanted, (12, 8), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(table, wanted)
    assert other(torch.randn(1, 3, 48, 32)).isfinite().all()


@every_fixed
def test_hub_round_trip_keeps_the_size(name, tmp_path):
    model = small(name, num_classes=6).eval()
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images(name)), model(images(name)))


@every_fixed
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_torchs_tools_take_the_model(name):
    model = alive(small(name, num_classes=5))
    x = images(name)
    out = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), out)
    torch.testing.assert_close(foveate.fuse(model, x)(x), out, rtol=1e-4, atol=1e-4)
    maps = model.forward_intermediates(x, intermediates_only=True)
    features = small(name, features_only=True).eval()
    assert [m.shape for m in features(x)] == [m.shape for m in maps]
    model(x).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_fixed
def test_files_are_of_the_models_size(name, tmp_path):
    pytest.importorskip("onnxscript")
    model, x = alive(small(name, num_classes=5)), images(name, batch=4)
    path = export_onnx(model, tmp_path / "net.onnx", example=x, dynamic=("batch",))
    assert verify(model, path, x).largest_relative < 1e-4
    with pytest.raises(ExportError, match="does not take images of every size"):
        export_program(model, tmp_path / "net.pt2", example=x, dynamic=("size",))


@every_fixed
def test_an_adapter_of_peft_acts_in_every_linear_layer(name):
    from peft import LoraConfig, get_peft_model

    model = alive(small(name))
    linear = [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=linear))
    torch.testing.assert_close(adapted(images(name)), model(images(name)), rtol=1e-4, atol=1e-4)
    adapted(images(name)).square().sum().backward()
    gradients = {key: p.grad for key, p in adapted.named_parameters() if ".lora_B." in key}
    assert len(gradients) == len(linear) and all(g.any() for g in gradients.values())
