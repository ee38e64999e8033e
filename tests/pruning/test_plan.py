"""Plans of single weights: exact ratios, what is ranked together, counts as in the paper, files, refusals."""

import dataclasses
import math

import pytest
import timm
import torch
from torch import nn

from foveate.pruning import Plan, PruningError, group_of_weights, plan, share_of_larger
from foveate.pruning.counts import count_masked, example_image

from .conftest import SMALL

GROUPS_OF = {"nat_mini": {"qkv", "prj", "mlp"}, "van_b0": {"prj", "mlp"}, "fv_halonet26t": {"qkv", "conv"}}
GROUPS_OF |= {"eca_resnet18": {"conv"}, "test_convnext": {"mlp"}, "swin_tiny_patch4_window7_224": {"qkv", "prj", "mlp"}}


def kept_share(p: Plan, groups: set[str]) -> float:
    masks = [mask for name, mask in p.masks.items() if p.groups[name] in groups]
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


@pytest.mark.parametrize("name", GROUPS_OF)
@pytest.mark.parametrize("ratio", [0.0, 0.37, 0.8])
def test_every_module_group_loses_exactly_the_ratio(name, ratio, small):
    p = plan(small(name), "dimap", ratio, img_size=56)
    assert set(p.groups.values()) == GROUPS_OF[name]
    for group in GROUPS_OF[name]:
        assert kept_share(p, {group}) == pytest.approx(1 - ratio, abs=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_norms_biases_stems_mergings_and_heads_are_kept(name, small):
    net = small(name)
    names = group_of_weights(net)
    ours = {n for n, p in net.named_parameters() if p.dim() < 2}
    ends = {n for n, _ in net.named_parameters() if n.startswith(("stem", "head", "fc.", "conv1", "patch_embed"))}
    assert names and not set(names) & (ours | ends)
    assert not any("downsample" in n or "table" in n or "rpb" in n for n in names)


def test_dimap_ranks_each_group_alone_and_lamp_the_whole_model(small):
    net = small("nat_mini")
    scores = {n: share_of_larger(net.get_parameter(n)) for n in group_of_weights(net)}
    for method in ("dimap", "lamp"):
        p = plan(net, method, 0.5, img_size=56)
        label = {n: g if method == "dimap" else "model" for n, g in p.groups.items()}
        for name, mask in p.masks.items():
            assert scores[name][mask].min() >= p.thresholds[label[name]] > scores[name][~mask].max()
    assert len(p.thresholds) == 1


def test_lamp_within_a_layer_is_magnitude(small):
    net = small("nat_mini")
    lamp, magnitude = (plan(net, method, 0.5, scope="layer", img_size=56) for method in ("lamp", "magnitude"))
    assert all(torch.equal(lamp.masks[n], magnitude.masks[n]) for n in lamp.masks)


def test_no_layer_is_left_without_a_weight(small):
    net = small("nat_mini")
    assert all(mask.any() for mask in plan(net, "dimap", 0.995, img_size=56).masks.values())
    with torch.no_grad():
        net.get_parameter("stages.0.blocks.0.attn.proj.weight").mul_(1e-6)
    with pytest.raises(PruningError, match=r"would leave stages\.0\.blocks\.0\.attn\.proj\.weight without a weight"):
        plan(net, "magnitude", 0.9, img_size=56)


def test_applied_masks_are_the_zeros_and_the_counts(small):
    net = small("nat_mini")
    p = plan(net, "dimap", 0.5, img_size=56)
    p.apply(net)
    for name, mask in p.masks.items():
        assert torch.equal(net.get_parameter(name) != 0, mask)
    assert p.counts.params_before - p.counts.params_after == sum(int((~m).sum()) for m in p.masks.values())
    assert p.counts.params_after == sum(int((q != 0).sum()) for q in net.parameters())


def test_a_pruned_checkpoint_is_masked_without_touching_the_given_one(small):
    net = small("nat_mini")
    p = plan(net, "dimap", 0.5, img_size=56)
    given = net.state_dict()
    masked = p.masked(given)
    p2 = plan(small("nat_mini"), "dimap", 0.5, img_size=56)
    applied = p2.apply(small("nat_mini")).state_dict()
    assert all(torch.equal(masked[n], applied[n]) for n in given)
    assert all((given[n] != 0).all() for n in p.masks)


def test_pruning_again_counts_the_zeros_that_are_there(small):
    net = small("nat_mini")
    first = plan(net, "dimap", 0.4, img_size=56)
    again = plan(first.apply(net), "dimap", 0.6, img_size=56)
    assert kept_share(again, {"qkv", "prj", "mlp"}) == pytest.approx(0.4, abs=1e-3)
    assert all(not (again.masks[n] & ~first.masks[n]).any() for n in first.masks)


# arXiv:2404.13648, table 1: (size, ratio, parameters M, FLOPs G); printed with one decimal, cut and not rounded (the
# dense Swin-B's 15.47 G stands there as 15.4)
SWIN = [("tiny", 0.15, 24.4, 3.8), ("tiny", 0.35, 19.2, 3.0), ("tiny", 0.55, 14.0, 2.2)]
SWIN += [("small", 0.15, 42.5, 7.5), ("small", 0.35, 33.1, 5.8), ("small", 0.55, 23.7, 4.1)]
SWIN += [("base", 0.15, 75.2, 13.2), ("base", 0.35, 58.4, 10.2), ("base", 0.55, 41.7, 7.3)]


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_swins_columns_are_those_of_the_paper(size):
    """The FLOPs printed are those of one ratio in every layer; ranking a group takes more where maps are small."""
    with torch.device("meta"):
        net = timm.create_model(f"swin_{size}_patch4_window7_224").eval()
    names = group_of_weights(net)
    image = example_image(net)
    for _, ratio, params, flops in (row for row in SWIN if row[0] == size):
        masks = {}
        for name in names:
            count = net.get_parameter(name).numel()
            masks[name] = torch.arange(count) >= round(ratio * count)
        counts = count_masked(net, masks, image)
        assert params * 0.99 <= counts.params_after / 1e6 < (params + 0.1) * 1.01
        assert flops * 0.99 <= counts.macs_after / 1e9 < (flops + 0.1) * 1.01


def test_a_weight_counts_once_for_each_place_where_it_is_applied(small):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 2, 1)
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)))

    net = Net()
    masks = {"conv.weight": torch.ones(4, 3, 3, 3, dtype=torch.bool), "fc.weight": torch.ones(5, 4, dtype=torch.bool)}
    masks["conv.weight"][0, 0, 0] = False
    masks["fc.weight"][:2] = False
    counts = count_masked(net, masks, torch.zeros(1, 3, 8, 12))
    assert counts.macs_before == 4 * 6 * 4 * 27 + 20
    assert counts.macs_before - counts.macs_after == 3 * 4 * 6 + 8
    assert counts.params_before - counts.params_after == 3 + 8


@pytest.mark.parametrize("name", ["fv_davit_tiny", "van_b0"])
def test_layers_whose_weights_their_parents_use_are_counted_too(name, small):
    net = small(name)
    p = plan(net, "magnitude", 0.0, groups=["qkv"] if name == "fv_davit_tiny" else ["depthwise"], img_size=40)
    dead = {n: torch.zeros_like(m) for n, m in p.masks.items()}
    counts = count_masked(net, dead, example_image(net, 40))
    assert 0 < counts.macs_after < counts.macs_before
    for one in dead:
        single = count_masked(net, {one: dead[one]}, example_image(net, 40))
        assert single.macs_after < single.macs_before, one


def test_two_of_four_keeps_the_best_two_of_each_four(small):
    net = small("nat_mini")
    p = plan(net, "magnitude", 0.5, pattern="2:4", img_size=56)
    assert p.pattern == "2:4" and p.masks
    for name, mask in p.masks.items():
        fours = mask.reshape(-1, 4)
        weights = net.get_parameter(name).abs().reshape(-1, 4)
        assert (fours.sum(1) == 2).all()
        kept, gone = weights[fours].view(-1, 2), weights[~fours].view(-1, 2)
        assert (kept.min(1).values >= gone.max(1).values).all()


@pytest.mark.parametrize("options", [{}, {"structure": ("heads", "mlp")}])
def test_a_saved_plan_is_read_back_bit_for_bit(options, small, tmp_path):
    p = plan(small("nat_mini"), "dimap", 0.3, img_size=56, **options)
    back = Plan.load(p.save(tmp_path / "plan.json"))
    for field in dataclasses.fields(Plan):
        if field.name not in ("masks", "cuts"):
            assert getattr(back, field.name) == getattr(p, field.name), field.name
    assert back.masks.keys() == p.masks.keys() and all(torch.equal(back.masks[n], m) for n, m in p.masks.items())
    assert back.cuts.keys() == p.cuts.keys()
    assert all(torch.equal(back.cuts[n][axis], kept) for n, axes in p.cuts.items() for axis, kept in axes.items())
    assert str(back) == str(p) and [f.name for f in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_cannot_be_changed(small):
    p = plan(small("nat_mini"), "dimap", 0.3, img_size=56)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.ratio = 0.5
    with pytest.raises(TypeError):
        p.masks["head.fc.weight"] = torch.ones(1)


def test_the_table_has_a_line_for_every_stage_and_group(small):
    table = plan(small("nat_mini"), "dimap", 0.5, img_size=56).table()
    assert table.row_count == 2 * 3
    assert list(table.columns[0].cells) == ["stages.0"] * 3 + ["stages.1"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio must be 0 to below 1, got 1.0"),
        ({"ratio": -0.1}, "ratio must be 0 to below 1, got -0.1"),
        ({"ratio": math.nan}, "ratio must be 0 to below 1, got nan"),
        ({"method": "dimapp"}, "unknown method 'dimapp'; known: dimap"),
        ({"groups": ["qvk"]}, "unknown group 'qvk'; known: qkv"),
        ({"groups": ["gate"]}, "group gate: Nat has no such weights; it has qkv, prj, mlp"),
        ({"scope": "stage"}, "scope must be layer, group or model"),
        ({"structure": ["neurons"]}, "unknown structure 'neurons'; known: heads"),
        ({"structure": ["heads"], "groups": ["qkv"]}, r"groups \(qkv\) select single weights"),
        ({"method": "taylor"}, "taylor needs data"),
        ({"method": "head_importance"}, "head_importance scores heads"),
        ({"method": "head_importance", "structure": ["heads"]}, "head_importance needs data"),
        ({"pattern": "1:4"}, "pattern: wanted 2:4 at ratio 0.5"),
        ({"pattern": "2:4", "ratio": 0.3}, "pattern: wanted 2:4 at ratio 0.5"),
    ],
)
def test_an_invalid_request_is_refused(options, message, small):
    with pytest.raises(PruningError, match=message):
        plan(small("nat_mini"), img_size=56, **options)


def test_a_model_without_declared_groups_is_refused():
    with pytest.raises(PruningError, match="Sequential declares no module groups"):
        plan(nn.Sequential(nn.Linear(2, 2)))


def test_a_plan_of_another_model_changes_nothing(small):
    p = plan(small("nat_mini"), "dimap", 0.5, img_size=56)
    other = small("nat_mini", dims=(32, 96))
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(PruningError, match=r"is \(192, 64\) there, \(288, 96\) in the model"):
        p.apply(other)
    with pytest.raises(PruningError, match="the model has no stages"):
        p.apply(small("van_b0"))
    with pytest.raises(PruningError, match="a plan of single weights cannot be cut; use apply"):
        p.cut(small("nat_mini"))
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "masks": {"a": 3}}'])
def test_a_file_that_is_no_plan_is_refused(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PruningError, match=r"plan .*plan\.json"):
        Plan.load(path)
    with pytest.raises(PruningError, match=r"plan .*none\.json does not exist"):
        Plan.load(tmp_path / "none.json")
