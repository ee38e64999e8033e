"""No file runs code: every gadget leaves a canary where it is executed, and none of our loaders makes one."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from foveate.export import ExportError, load_model, save_hub
from foveate.export.weights import read_model_weights
from foveate.train import TrainError, load_net, load_recipe
from foveate.train.checkpoints import read_checkpoint
from foveate.train.hooks import build_hooks
from foveate.train.model import build_net

from .pickles import Global, build, inst, legacy, new, pickled, plain_checkpoint, reduce, rewritten, zipped

GETATTR = Global("__builtin__", "getattr")
HISTORY = Global("mmengine.logging.history_buffer", "HistoryBuffer")
FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")


def gadgets(canary: Path) -> dict[str, object]:
    """Each would make the folder `canary` if a loader followed it."""
    mkdir, path = Global("os", "mkdir"), str(canary)
    by_getattr = reduce(GETATTR, reduce(GETATTR, HISTORY, "__init__"), "__globals__")
    codecs = reduce(GETATTR, Global("_codecs", "encode"), "__self__")  # a module, by an attribute of what is allowed
    load = reduce(GETATTR, reduce(GETATTR, codecs, "__loader__"), "load_module")
    posix = reduce(FROM_TYPE, load, reduce(GETATTR, codecs, "__class__"), ("posix",), {})
    return {
        "getattr and torch's rebuild function": reduce(
            FROM_TYPE, reduce(GETATTR, posix, "mkdir"), Global("torch", "Tensor"), (path,), {}
        ),
        "reduce": reduce(mkdir, path),
        "reduce, posix": reduce(Global("posix", "mkdir"), path),
        "new": new(mkdir, path),
        "inst": inst("os", "mkdir", path),
        "eval": reduce(Global("__builtin__", "eval"), f"__import__('os').mkdir({path!r})"),
        "getattr of a module": reduce(reduce(GETATTR, Global("mmengine.logging", "os"), "mkdir"), path),
        "getattr of globals": reduce(reduce(GETATTR, by_getattr, "get"), path),
        "dotted name": reduce(Global("mmengine.logging.history_buffer", "np.os.mkdir"), path),
        "torch's rebuild function": reduce(FROM_TYPE, mkdir, Global("torch", "Tensor"), (path,), {}),
        "rebuild by getattr": reduce(
            FROM_TYPE, reduce(GETATTR, Global("numpy", "os"), "mkdir"), Global("torch", "Tensor"), (path,), {}
        ),
        "wrapper subclass": reduce(
            Global("torch._utils", "_rebuild_wrapper_subclass"), mkdir, path, (), (), 0, None, "cpu", False
        ),
        "numpy scalar": reduce(Global("numpy.core.multiarray", "scalar"), reduce(mkdir, path), b""),
        "numpy reconstruct": reduce(Global("numpy.core.multiarray", "_reconstruct"), mkdir, (path,), b"b"),
        "history with state": build(new(HISTORY), {"_statistics_methods": reduce(mkdir, path)}),
        "namespace with state": build(new(Global("argparse", "Namespace")), {"__class__": reduce(mkdir, path)}),
        "jit": reduce(Global("torch.jit", "load"), path),
        "torch.load": reduce(Global("torch.serialization", "load"), path),
        "functools": reduce(reduce(Global("functools", "partial"), mkdir, path)),
    }


NAMES = list(gadgets(Path("x")))
CONTAINERS = {"zip": zipped, "legacy": legacy}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_gadget_is_not_followed(name, container, tmp_path):
    canary = tmp_path / "canary"
    content = {"state_dict": {}, "meta": {}, "message_hub": gadgets(canary)[name]}
    file = CONTAINERS[container](content, tmp_path / "net.pth")
    for read, error in ((read_model_weights, ExportError), (read_checkpoint, TrainError)):
        try:
            read(file)
        except error:
            pass
        assert not canary.exists()
    with pytest.raises(ExportError):
        load_model("test_resnet", file)
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_gadgets_work_where_a_loader_follows_them(tmp_path):
    for name in ("reduce", "reduce, posix", "inst", "eval"):
        canary = tmp_path / name
        pickle.loads(pickled({"x": gadgets(canary)[name]}))
        assert canary.exists()
    canary = tmp_path / "rebuilt"
    content = {"a": HISTORY, "x": gadgets(canary)["getattr and torch's rebuild function"]}
    with torch.serialization.safe_globals([getattr, HistoryBuffer]), pytest.raises(AttributeError):
        torch.load(zipped(content, tmp_path / "net.pth"), weights_only=True)
    assert canary.exists()  # what allowing getattr would mean


def mmengine_file(folder: Path) -> tuple[Path, nn.Module]:
    """A checkpoint that MMEngine's own Runner writes: message hub, optimiser, NumPy scalars."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader

    class Wrapper(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model("test_resnet", num_classes=7)

        def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str) -> dict:
            return {"loss": nn.functional.cross_entropy(self.backbone(x), y)}

    data = [(torch.randn(3, 32, 32), torch.tensor(i)) for i in range(4)]
    runner = Runner(
        model=Wrapper(),
        work_dir=str(folder),
        train_dataloader=DataLoader(data, 2),
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
        log_level="ERROR",
    )
    runner.message_hub.update_info("best", np.float64(0.5))
    runner.train()
    return folder / "epoch_1.pth", runner.model.backbone


def test_a_checkpoint_of_mmengines_runner_loads_and_the_same_file_with_a_call_in_it_does_not(tmp_path):
    file, net = mmengine_file(tmp_path / "run")
    with zipfile.ZipFile(file) as archive:
        names = archive.read("archive/data.pkl")
    assert names[-2:] == b"u." and b"HistoryBuffer" in names and b"getattr" in names and b"numpy" in names
    loaded = load_model("test_resnet", file, num_classes=7)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in net.state_dict().items())

    canary = tmp_path / "canary"
    for name, gadget in gadgets(canary).items():
        call = pickled("more")[2:-1] + pickled(gadget)[2:-1] + b"s."  # one entry more in the checkpoint's dict
        edited = rewritten(file, tmp_path / "edited.pth", lambda data, call=call: data[:-1] + call)
        try:  # most are refused; those made of ignored names only are dropped like the log
            load_model("test_resnet", edited, num_classes=7)
        except ExportError as error:
            assert "edited.pth" in str(error), name
        assert not canary.exists(), name


def test_what_a_hub_folder_holds_runs_nothing_either(tmp_path):
    folder = save_hub(timm.create_model("test_resnet", num_classes=7), tmp_path / "hub")
    canary = tmp_path / "canary"
    os.remove(folder / "model.safetensors")
    zipped({"state_dict": {"x": gadgets(canary)["reduce"]}}, folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match="needs more than tensors"):
        load_model(f"local-dir:{folder}")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "os.system"}, "unknown architecture, os.system"),
        ({"architecture": "hf-hub:some/one"}, "unknown architecture, hf-hub:some/one"),
        ({"architecture": "narrowed", "model_args": {"of": "hf-hub:some/one", "widths": {}}}, "unknown architecture"),
        ({"model_args": {"checkpoint_path": "other.pth"}}, "checkpoint_path is an argument of timm's loader"),
        ({"model_args": {"pretrained_strict": False}}, "pretrained_strict is an argument of timm's loader"),
        ({"model_args": {"pretrained_cfg": {"file": "other.pth"}}}, "pretrained_cfg is an argument of timm's loader"),
        ({"model_args": ["x"]}, "not a section of keys"),
        ({"architecture": 3}, "names no architecture"),
    ],
)
def test_a_hub_configuration_leads_nowhere_else(change, message, tmp_path):
    folder = save_hub(timm.create_model("test_resnet", num_classes=7), tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ExportError, match=message):
        load_model(f"local-dir:{folder}")


def test_weights_that_a_hub_configuration_names_elsewhere_are_not_read(tmp_path):
    net = timm.create_model("test_resnet", num_classes=7)
    folder = save_hub(net, tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    elsewhere = {"file": "/nowhere.pth", "url": "http://127.0.0.1:9/x.pth", "hf_hub_id": "a/b", "custom_load": "hf"}
    config["pretrained_cfg"] |= elsewhere | {"source": "url"}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(f"local-dir:{folder}")
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in net.state_dict().items())


def test_narrowed_downloads_nothing():
    with pytest.raises(ValueError, match="of= wants a timm model name, got 'hf-hub:some/one'"):
        timm.create_model("narrowed", of="hf-hub:some/one", widths={})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_programs_and_tar_archives_are_refused_as_what_they_are(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pth")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "net.pt2")
    for name in ("script.pth", "net.pt2"):
        with pytest.raises(ExportError, match=r"is a program \(TorchScript or torch\.export\), which runs code"):
            read_model_weights(tmp_path / name)
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    with pytest.raises(ExportError, match="is a tar archive, as torch wrote them before"):
        read_model_weights(tmp_path / "old.pth")


def test_files_of_torch_load_as_torch_loads_them(tmp_path):
    base = torch.randn(4, 6)
    content = {"view": base[1:, ::2].t(), "base": base, "half": base.half(), "wide": torch.zeros(1).expand(3, 5)}
    content |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(3), "bool": base > 0, "complex": base[:, :2] * 1j}
    content |= {"parameter": nn.Parameter(base), "bfloat16": base.bfloat16()}
    for new_format in (True, False):
        torch.save({"state_dict": content, "args": 3}, tmp_path / "net.pth", _use_new_zipfile_serialization=new_format)
        read = read_model_weights(tmp_path / "net.pth")
        for name, tensor in torch.load(tmp_path / "net.pth", weights_only=True)["state_dict"].items():
            assert read[name].dtype == tensor.dtype and read[name].stride() == tensor.stride()
            assert torch.equal(read[name], tensor), name


RECIPE = {"model": {"name": "test_resnet"}, "data": {}, "optimizer": {"lr": 0.1}, "schedule": {"epochs": 1}}


def test_yaml_and_json_recipes_are_data(tmp_path):
    canary = tmp_path / "canary"
    for text in (
        f"model: !!python/object/apply:os.mkdir ['{canary}']",
        f"model: !!python/object/new:os.mkdir ['{canary}']",
        "model: !!python/name:os.system",
        "model: !!python/module:this",
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(TrainError, match=r"recipe.yaml is not plain YAML"):
            load_recipe(tmp_path / "recipe.yaml")
        assert not canary.exists()
    evil = tmp_path / "evil_module.py"
    evil.write_text(f"import os; os.mkdir({str(canary)!r})")
    for key in ("custom_imports", "_base_"):
        (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | {key: {"imports": ["evil_module"]}}))
        with pytest.raises(TrainError, match=f"unknown key {key}"):
            load_recipe(tmp_path / "recipe.json")
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    (tmp_path / "recipe.yml").write_text(json.dumps(RECIPE))
    assert load_recipe(tmp_path / "recipe.json") == load_recipe(tmp_path / "recipe.yml") == load_recipe(RECIPE)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"type": "os.mkdir", "path": "canary"}, "no hook is registered as 'os.mkdir'"),
        ({"type": "mmengine.hooks.EMAHook"}, "no hook is registered as 'mmengine.hooks.EMAHook'; did you mean EMAHook"),
        ({"type": 3}, "no hook is registered as 3"),
        ({"type": "EMAHook", "ema_type": "os.mkdir"}, "EMAHook would import 'os.mkdir'"),
        ({"type": "EMAHook", "ema_type": "antigravity"}, "EMAHook would import 'antigravity'"),
        ({"type": "PrepareTTAHook", "tta_cfg": {"type": "os.mkdir"}}, "PrepareTTAHook would import 'os.mkdir'"),
        ({"type": "CheckpointHook", "x": [{"_scope_": "antigravity"}]}, "CheckpointHook would import 'antigravity'"),
    ],
)
def test_hooks_are_taken_by_registered_name_only(hook, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainError, match=message):
        build_hooks(load_recipe(RECIPE | {"hooks": [hook]}))
    assert os.listdir() == []


def test_a_python_recipe_may_import_a_hooks_class(tmp_path):
    lines = [f"{key} = {value!r}" for key, value in RECIPE.items()]
    for text in ("from mmengine.hooks import IterTimerHook", "hooks = [dict(type=IterTimerHook)]"):
        lines.append(text)
    (tmp_path / "recipe.py").write_text("\n".join(lines))
    recipe = load_recipe(tmp_path / "recipe.py")
    assert recipe.hooks == ({"type": "IterTimerHook"},)
    assert [type(hook).__name__ for hook in build_hooks(recipe)] == ["IterTimerHook"]
    (tmp_path / "recipe.py").write_text(
        "\n".join(lines).replace("mmengine.hooks", "os").replace("IterTimerHook", "mkdir")
    )
    with pytest.raises(TrainError, match=r"no hook is registered as 'os\.mkdir'"):
        build_hooks(load_recipe(tmp_path / "recipe.py"))


def test_the_recipe_inside_a_checkpoint_never_builds_hooks(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a hook was built")

    recipe = load_recipe(RECIPE)
    net = build_net(recipe)
    data = RECIPE | {"hooks": [{"type": "KeepMasks", "plan": "none.json"}, {"type": "os.mkdir"}]}
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"meta": {"recipe": data, "classes": None}, "state_dict": state}, tmp_path / "net.pth")
    monkeypatch.setattr("mmengine.registry.HOOKS.build", refuse)
    assert torch.equal(load_net(tmp_path / "net.pth").fc.weight, net.fc.weight)


def test_the_recipe_inside_a_checkpoint_leads_to_no_other_file(tmp_path):
    net = build_net(load_recipe(RECIPE))
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    for key, value, message in (
        ("checkpoint_path", "other.pth", "checkpoint_path is an argument of timm's loader"),
        ("name", "hf-hub:some/one", "unknown model 'hf-hub:some/one'"),
        ("name", f"local-dir:{tmp_path}", "unknown model 'local-dir:"),
    ):
        data = RECIPE | {"model": RECIPE["model"] | {key: value}}
        torch.save({"meta": {"recipe": data}, "state_dict": state}, tmp_path / "net.pth")
        with pytest.raises(TrainError, match=message):
            load_net(tmp_path / "net.pth")


def test_unknown_objects_beside_the_weights_are_refused_with_their_name(tmp_path):
    plain_checkpoint(tmp_path / "net.pth")
    assert read_model_weights(tmp_path / "net.pth").keys() == {"weight", "bias"}
    torch.save({"state_dict": {"a": torch.zeros(1)}, "path": tmp_path}, tmp_path / "net.pth")
    with pytest.raises(ExportError, match=r"needs more than tensors \(pathlib\.\w+\), which could run code"):
        read_model_weights(tmp_path / "net.pth")
