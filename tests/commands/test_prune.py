"""`foveate prune`: a hub folder and the plan on success; one line, exit code 2 and nothing written on failure."""

import os

import pytest
import timm
import torch
from typer.testing import CliRunner

from foveate.commands.main import app
from foveate.pruning import Plan

NET = ["nat_mini", "--img-size", "56"]
for pair in ("dims=(32,64)", "depths=(1,2)", "kernel_size=3", "head_dim=8", "num_classes=7"):
    NET += ["--model-arg", pair]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prune(*arguments: str):
    return CliRunner().invoke(app, ["prune", *arguments])


def test_structures_are_cut_and_timm_loads_the_folder():
    done = prune(*NET, "-o", "out", "--ratio", "0.3", "--structure", "heads,mlp")
    assert done.exit_code == 0, done.output
    assert sorted(os.listdir("out")) == ["config.json", "model.safetensors", "plan.json"]
    net = timm.create_model("local-dir:out", pretrained=True)
    p = Plan.load("out/plan.json")
    assert sum(q.numel() for q in net.parameters()) == p.counts.params_after
    assert p.structure == ("heads", "mlp") and p.ratio == 0.3 and p.method == "dimap"
    for fact in ("heads removed", "6 of 20", "mlp removed", "144 of 480", "stages.1", "(in std)", "random: neither"):
        assert fact in done.stdout, fact


def test_a_pruned_folder_is_pruned_again():
    assert prune(*NET, "-o", "once", "--ratio", "0.3", "--structure", "mlp").exit_code == 0
    done = prune("local-dir:once", "-o", "twice", "--ratio", "0.3", "--structure", "heads,mlp", "--img-size", "56")
    assert done.exit_code == 0, done.output
    assert "local-dir:once" in done.stdout  # where the weights came from
    once, twice = (timm.create_model(f"local-dir:{name}", pretrained=True) for name in ("once", "twice"))
    sizes = [sum(p.numel() for p in net.parameters()) for net in (once, twice)]
    assert sizes[1] < sizes[0]
    assert twice(torch.zeros(1, 3, 56, 56)).shape == (1, 7)


def test_single_weights_are_zeroed_in_the_checkpoint_given():
    torch.manual_seed(0)
    net = timm.create_model("nat_mini", dims=(32, 64), depths=(1, 2), kernel_size=3, head_dim=8, num_classes=7)
    torch.save(net.state_dict(), "weights.pth")
    done = prune(*NET, "-o", "out", "--checkpoint", "weights.pth", "--ratio", "0.4", "--groups", "qkv,mlp")
    assert done.exit_code == 0, done.output
    pruned = timm.create_model("local-dir:out", pretrained=True).state_dict()
    p = Plan.load("out/plan.json")
    assert set(p.groups.values()) == {"qkv", "mlp"}
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(pruned[name], tensor * p.masks[name] if name in p.masks else tensor)


def test_the_ratio_follows_from_the_multiply_adds_wanted():
    done = prune(*NET, "-o", "out", "--target-macs", "0.006", "--structure", "heads,mlp")
    assert done.exit_code == 0, done.output
    p = Plan.load("out/plan.json")
    assert 0.0055e9 < p.counts.macs_after <= 0.006e9 < p.counts.macs_before


def test_the_ratio_follows_from_the_latency_wanted(monkeypatch):
    monkeypatch.setattr(
        "foveate.pruning.targets.Latency.of", lambda self, net: sum(p.numel() for p in net.parameters())
    )
    done = prune(*NET, "-o", "out", "--target-latency", "90000", "--structure", "heads,mlp")
    assert done.exit_code == 0, done.output
    assert 85_000 < Plan.load("out/plan.json").counts.params_after <= 90_000


def test_a_latency_is_measured_on_the_cut_net():
    done = prune(*NET, "-o", "out", "--target-latency", "1e6", "--structure", "mlp")
    assert done.exit_code == 0, done.output
    assert Plan.load("out/plan.json").ratio == 0
    done = prune(*NET, "-o", "other", "--target-latency", "1e-6", "--structure", "mlp")
    assert done.exit_code == 2 and "no ratio brings the model to 1e-06 ms: the lowest cost was" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.0"], "ratio must be 0 to below 1, got 1.0"),
        (["--ratio", "-1"], "ratio must be 0 to below 1, got -1.0"),
        (["--groups", "qvk"], "unknown group 'qvk'"),
        (["--structure", "width"], "structure 'width': Nat has none that can be cut"),
        (["--checkpoint", "none.pth"], "checkpoint none.pth does not exist"),
        (["--checkpoint", "van.pth"], "cannot be loaded into nat_mini"),
        (["--ratio", "0.5", "--target-macs", "1"], "give one of --ratio, --target-macs and --target-latency"),
        (["--target-latency", "5"], "zeroed weights do not reduce latency"),
        (["--target-macs", "0.0001"], "no ratio brings the model to 0.0001 GMACs"),
        (["--pattern", "2:4", "--ratio", "0.3"], "pattern: wanted 2:4 at ratio 0.5"),
    ],
)
def test_a_mistake_prints_one_line_and_writes_nothing(arguments, message):
    torch.save(timm.create_model("van_b0", dims=(8, 16), depths=(1, 1), mlp_ratios=(2, 2)).state_dict(), "van.pth")
    done = prune(*NET, "-o", "out", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert os.listdir() == ["van.pth"] and done.stdout == ""


def test_a_cut_that_is_not_the_net_with_zeros_is_refused(monkeypatch):
    whole = Plan.cut

    def wrong(self, model):
        smaller = whole(self, model)
        with torch.no_grad():
            smaller.stages[1].blocks[0].mlp.fc2.weight[0, 0] += 0.1
        return smaller

    monkeypatch.setattr(Plan, "cut", wrong)
    done = prune(*NET, "-o", "out", "--structure", "mlp")
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("foveate prune: the pruned model differs from the masked model by ")
    assert os.listdir() == []


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_cut_whose_output_is_no_number_is_refused(broken, monkeypatch):
    whole = Plan.cut

    def wrong(self, model):
        smaller = whole(self, model)
        smaller.head.fc.bias.data[0] = broken
        return smaller

    monkeypatch.setattr(Plan, "cut", wrong)
    done = prune(*NET, "-o", "out", "--structure", "mlp")
    assert done.exit_code == 2 and "the pruned model differs" in done.stderr and os.listdir() == []


def test_a_model_without_groups_or_a_taken_folder_is_refused():
    done = prune("test_efficientnet", "-o", "out")
    assert done.exit_code == 2 and "EfficientNet declares no module groups" in done.stderr
    os.mkdir("taken")
    open("taken/file", "w").close()
    done = prune(*NET, "-o", "taken")
    assert done.exit_code == 2 and "not an empty folder" in done.stderr
    assert os.listdir("taken") == ["file"]
