"""LoRA: a recipe trains adapters, peft reads them, and every way out of training gives the same logits."""

import json

import pytest
import timm
import torch

from foveate.export import ExportError, export_onnx, load_adapter, load_model, merge_lora, open_file, verify
from foveate.train import TrainError, evaluate, export_adapter, export_weights, load_net, read_scalars, train
from foveate.train.checkpoints import net_weights, read_checkpoint

MODEL = {"name": "nat_mini", "dims": (16, 32), "depths": (1, 1), "head_dim": 8, "kernel_size": 3, "num_classes": 3}
KEYWORDS = {key: value for key, value in MODEL.items() if key != "name"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Weights of a model with other classes, to start from."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(timm.create_model("nat_mini", **KEYWORDS | {"num_classes": 5}).state_dict(), path)
    return path


@pytest.fixture
def recipe(make_recipe, base):
    def make(**lora):
        model = MODEL | {"checkpoint": str(base), "lora": {"rank": 4, **lora}}
        return make_recipe(model=model, optimizer={"lr": 0.05}, data={"img_size": 32})

    return make


@pytest.fixture
def run(recipe, tmp_path):
    return train(recipe(), work_dir=tmp_path / "run", device="cpu")


def test_only_adapters_and_the_classifier_train(run, base):
    trained = net_weights(read_checkpoint(run.last_checkpoint))
    start = torch.load(base)
    frozen = {key: value for key, value in trained.items() if "lora_" not in key and not key.startswith("head")}
    assert len(frozen) > 20
    for key, value in frozen.items():
        assert torch.equal(value, start[key.replace(".base_layer", "")]), key
    changed = [key for key, value in trained.items() if "lora_B" in key and value.abs().max() > 0]
    assert len(changed) == len([key for key in trained if "lora_B" in key]) > 0


def test_every_way_out_gives_the_same_logits(run, base, tmp_path, images):
    x = torch.randn(3, 3, 32, 32)
    net = load_net(run.best_checkpoint)
    wanted = net(x)
    assert {key for key in net.state_dict()} == set(torch.load(base))
    merged = load_model("nat_mini", export_weights(run.best_checkpoint, tmp_path / "merged.safetensors"), **KEYWORDS)
    torch.testing.assert_close(merged(x), wanted, rtol=0, atol=1e-6)
    adapter = run.work_dir / "adapter"
    adapted = load_model("nat_mini", base, adapter=adapter, **KEYWORDS | {"num_classes": 5})
    torch.testing.assert_close(adapted(x), wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_merged_adapters_are_exported(run, base, tmp_path):
    net, x = load_net(run.best_checkpoint), torch.randn(3, 3, 32, 32)
    adapted = load_model("nat_mini", base, adapter=run.work_dir / "adapter", **KEYWORDS | {"num_classes": 5})
    file = export_onnx(adapted, tmp_path / "net.onnx", img_size=32)
    torch.testing.assert_close(open_file(file).run(x)[0], net(x), rtol=1e-4, atol=1e-5)
    assert verify(net, file, torch.randn(4, 3, 32, 32)).largest_relative <= 1e-4


def test_peft_itself_reads_the_adapter(run, base):
    from peft import PeftModel

    net = timm.create_model("nat_mini", **KEYWORDS).eval()
    weights = {key: value for key, value in torch.load(base).items() if not key.startswith("head.")}
    net.load_state_dict(weights, strict=False)
    adapted = PeftModel.from_pretrained(net, str(run.work_dir / "adapter")).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(adapted(x), load_net(run.best_checkpoint)(x), rtol=1e-5, atol=1e-6)


def test_the_adapter_holds_the_averages_where_they_are_on(recipe, base, tmp_path):
    run = train({**recipe(), "ema": 0.5}, work_dir=tmp_path / "run", device="cpu")
    adapted = load_model("nat_mini", base, adapter=run.work_dir / "adapter", **KEYWORDS | {"num_classes": 5})
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(adapted(x), load_net(run.best_checkpoint)(x), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_is_evaluated_and_resumed(run, recipe):
    assert evaluate(run.last_checkpoint, device="cpu").top1 == read_scalars(run.log)[-1]["val_top1"]
    with pytest.raises(TrainError, match=r"model\.lora"):
        train(recipe(rank=2), work_dir=run.work_dir, resume=True, device="cpu")
    assert train(recipe(), work_dir=run.work_dir, resume=True, device="cpu").epochs == 2


@pytest.mark.parametrize(
    ("lora", "differs"),
    [
        ({"rank": 2}, "shape"),
        ({"alpha": 64.0}, "value"),
        ({"targets": ("*.qkv",)}, "shape"),
        ({"dropout": 0.5}, "value"),
    ],
)
def test_every_key_changes_the_run(lora, differs, run, recipe, tmp_path):
    other = train(recipe(**lora), work_dir=tmp_path / "other", device="cpu")
    first, second = (net_weights(read_checkpoint(result.last_checkpoint)) for result in (run, other))
    sizes = [{key: value.shape for key, value in weights.items()} for weights in (first, second)]
    assert (sizes[0] != sizes[1]) if differs == "shape" else any(not torch.equal(first[k], second[k]) for k in first)


def test_requests_that_cannot_work_are_refused(recipe, make_recipe, tmp_path):
    for change, message in [
        ({"lora": {"targets": ("*.qkw",)}}, r"'\*\.qkw' matches no linear layer"),
        ({"lora": {"rank": 0}}, "model.lora.rank: wanted a number >= 1"),
        ({"lora": {"ranks": 4}}, "unknown key model.lora.ranks"),
        ({"checkpoint": None, "lora": {}}, "give model.checkpoint or model.pretrained"),
    ]:
        with pytest.raises(TrainError, match=message):
            train(make_recipe(model=recipe()["model"] | change), work_dir=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.pth"))


def test_a_checkpoint_without_adapters_has_none_to_write(make_recipe, tmp_path):
    run = train(make_recipe(schedule={"epochs": 1}), work_dir=tmp_path / "run", device="cpu")
    assert not (run.work_dir / "adapter").exists()
    with pytest.raises(TrainError, match="has no adapters"):
        export_adapter(run.last_checkpoint, tmp_path / "adapter")


def test_adapters_of_another_kind_are_refused(run, base, tmp_path):
    folder = run.work_dir / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    model = lambda **other: timm.create_model("nat_mini", **KEYWORDS | other)  # noqa: E731
    with pytest.raises(ExportError, match="does not fit Nat"):
        load_adapter(model(dims=(32, 64)), folder)
    with pytest.raises(ExportError, match="changes given weights"):
        load_model("nat_mini", adapter=folder, **KEYWORDS)
    for change, message in [
        ({"peft_type": "IA3"}, "wanted an adapter of LoRA"),
        ({"velora_config": {"a": 1}}, "velora_config"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ExportError, match=message):
            load_adapter(model(), folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ExportError, match="truncated or damaged"):
        load_adapter(model(), folder)


def test_merging_leaves_plain_layers(base):
    from foveate.export.adapters import add_lora, has_lora

    torch.manual_seed(0)
    net = timm.create_model("van_b0", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), num_classes=3).eval()
    kinds = {name: type(module) for name, module in net.named_modules()}
    x = torch.randn(2, 3, 64, 64)
    before = net(x)
    add_lora(net, 2, 4.0, 0.0, ("*",), ("head",))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    changed = net(x)
    assert has_lora(net) and (changed - before).abs().max() > 1e-3
    merged = merge_lora(net)
    assert not has_lora(merged) and {name: type(module) for name, module in merged.named_modules()} == kinds
    torch.testing.assert_close(merged(x), changed, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in merged.parameters())
