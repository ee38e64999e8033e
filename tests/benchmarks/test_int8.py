"""The benchmarks of int8 files and of outliers: every column has its figure or its reason."""

import pytest
import timm
import torch
from torch import nn

from foveate.benchmarks import int8, outliers
from foveate.benchmarks._digits_runs import digits, digits_recipes, top1
from foveate.benchmarks.int8 import Accuracy, Settings, Speed, main, notes, tabulate_accuracy, tabulate_speed
from foveate.export import ExportError
from foveate.export.presets import PRESETS

RECIPE = "van_micro_1xb64_mnist5k"
VIT = {"img_size": 28, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 1, "num_classes": 10}


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def untrained(calls: list, name: str = "van_b0", **kwargs):
    """Return a stand-in for training: a small model for digits."""

    def make(recipe, folder, options=None, epochs=None):
        calls.append((recipe, folder.name, options, epochs))
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs).eval()
        model.pretrained_cfg |= {"input_size": (1, 28, 28)}
        return model

    return make


@pytest.mark.slow
def test_a_run_prints_and_writes_both_tables(monkeypatch, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    calls: list = []
    small = {"dims": (8, 16), "depths": (1, 1), "mlp_ratios": (2, 2), "in_chans": 1, "num_classes": 10}
    monkeypatch.setattr(int8, "trained", untrained(calls, **small))
    monkeypatch.setattr(int8, "digits", lambda *of: tuple(t[:200] for t in digits(*of)))
    arguments = ["--recipes", RECIPE, "--models", "test_resnet", "--img-size", "64", "--rounds", "1", "--epochs", "3"]
    arguments += ["--runtimes", "onnxruntime", "--runs", str(tmp_path / "runs"), "--files", str(tmp_path / "files")]
    with monkeypatch.context() as patch:
        main(arguments)
        patch.setattr(int8, "_write_files", None)  # the second run takes those of the first
        main([*arguments, "--out", str(tmp_path / "out.txt")])
    assert calls == [(RECIPE, RECIPE, None, 3)] * 2
    for text in (capsys.readouterr().out, (tmp_path / "out.txt").read_text()):
        assert "van_b0" in text and "test_resnet" in text and "batch 1, 64 px" in text
        assert all(name in text for name in PRESETS)
    assert "Command" in (tmp_path / "out.txt").read_text()


def test_outliers_are_measured_for_every_form(monkeypatch, tmp_path):
    calls: list = []
    monkeypatch.setattr(outliers, "trained", untrained(calls, "quantizable_vit_tiny", **VIT))
    monkeypatch.setattr(outliers, "digits", lambda split: tuple(t[:100] for t in digits(split)))
    outliers.main(["--epochs", "1", "--out", str(tmp_path / "out.txt")])
    text = (tmp_path / "out.txt").read_text()
    assert all(form in text for form in outliers.FORMS) and len({str(call[2]) for call in calls}) == len(outliers.FORMS)
    assert calls[0][2] == {"model.softmax_clip": None, "model.gate": None, "seed": 0}
    row = outliers.measure("plain", {}, tmp_path, seed=0, epochs=None)
    assert 0 <= row.int8 <= 100 and row.inf_norm > 0 and row.max_kurtosis >= row.mean_kurtosis > 1


def test_the_options_of_every_form_build_a_model():
    from foveate.train import load_recipe
    from foveate.train.model import build_net

    for keywords in outliers.FORMS.values():
        net = build_net(load_recipe(outliers.RECIPE, {f"model.{name}": value for name, value in keywords.items()}))
        assert isinstance(net, nn.Module)


def test_a_file_that_cannot_be_written_is_a_dash_and_a_line(monkeypatch):
    def refuse(*args):
        raise ExportError("no such operator\nand more")

    monkeypatch.setattr(int8, "write", refuse)
    found = int8.measure_speed("test_resnet", Settings(models=("test_resnet",), img_size=64, rounds=1))
    assert found.refused == dict.fromkeys(("onnxruntime", "openvino"), "no such operator")
    assert "test_resnet, openvino: no such operator" in notes([found])
    assert tabulate_speed([found], Settings(rounds=1)).row_count == 1


def test_int8_is_not_timed_on_a_cpu_without_its_products(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(int8, "has_vnni", lambda: False)
    settings = Settings(models=("test_resnet",), img_size=32, rounds=1, runtimes=("onnxruntime",))
    found = int8.measure_speed("test_resnet", settings)
    assert found.seconds["onnxruntime"][1] is None and found.bytes["onnxruntime"][1] > 0
    assert "int8 latency: this CPU adds no int8 products" in notes([found])


def test_cells_compare_int8_with_float32():
    row = Speed("net", {"aoti": (0.02, 0.01), "openvino": (0.02, None)}, {"aoti": (100, 30), "openvino": (100, 25)})
    assert int8._cells(row, "aoti") == ("20.0 / 10.0", "2.00", "0.30")
    assert int8._cells(row, "openvino") == ("20.0 / -", "-", "0.25")
    assert int8._cells(row, "onnxruntime") == ("-", "-", "-")
    assert tabulate_accuracy([Accuracy("net", {"float32": 97.0}, {"float32": 10**6})]).row_count == 1


def test_every_family_is_measured():
    from timm.models import model_entrypoint

    from foveate.backbones import FAMILIES
    from foveate.train import load_recipe

    names = {family.__name__ for family in FAMILIES}
    of_recipes = {model_entrypoint(load_recipe(name).model.name).__module__ for name in digits_recipes()}
    assert names <= {model_entrypoint(name).__module__ for name in int8.MODELS} | {"foveate.backbones.nat_isotropic"}
    assert names <= of_recipes


def test_accuracy_is_the_share_of_hits():
    images, targets = digits("validation")
    assert len(images) == 1000 and images.shape[1:] == (1, 28, 28)
    assert top1(lambda x: nn.functional.one_hot(targets[: len(x)], 10).float(), images[:100], targets[:100]) == 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runtimes", "tvm"], "unknown runtimes: tvm; known: onnxruntime"),
        (["--recipes", "nat"], "unknown recipes: nat; known: agent_cswin_micro"),
        (["--recipes", "--runtimes"], "wanted names of recipes, runtimes or both, got none"),
        (["--epochs", "0"], "wanted at least 1, got epochs 0"),
        (["--models", "no_such"], "unknown models: no_such"),
    ],
)
def test_an_invalid_request_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def test_digits_have_the_size_of_their_recipe():
    assert digits("validation", "flowformer_micro_1xb64_mnist5k")[0].shape == (1000, 1, 32, 32)
    assert torch.equal(digits("validation", RECIPE)[0], digits("validation")[0])
