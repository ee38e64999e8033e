"""Every key of loss, distill, engine, model.freeze, log.tensorboard and val_interval changes what a run records."""

import logging

import pytest
import timm
import torch
from PIL import Image
from timm.loss import BinaryCrossEntropy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from foveate.train import TrainError, evaluate, load_net, load_recipe, read_scalars, train
from foveate.train.checkpoints import net_weights, read_checkpoint
from foveate.train.losses import average_precision, choose_loss, judge, summarise
from foveate.train.model import build_net
from foveate.train.parallel import prepare_net, residual_blocks

VIT = {"name": "test_vit", "img_size": 16}


@pytest.fixture
def run(make_recipe, tmp_path):
    """Return a function that trains one epoch of a tiny recipe with changes, and returns result and last record."""

    def go(name: str, **changes):
        recipe = make_recipe(**{"schedule": {"epochs": 1}, **changes})
        result = train(recipe, work_dir=tmp_path / name)
        return result, read_scalars(result.log)[-1]

    return go


def test_each_loss_key_changes_the_loss_of_the_run(run):
    soft = {"mixup": 0.5, "smoothing": 0.1}
    losses = [
        run(name, loss=loss, augment=augment)[1]["train_loss"]
        for name, loss, augment in (
            ("ce", {}, soft),
            ("bce", {"kind": "bce"}, soft),
            ("hard", {"kind": "bce", "threshold": 0.2}, soft),
            ("index", {"kind": "bce"}, {}),
        )
    ]
    assert len(set(losses)) == 4


MOH = {"name": "moh_transnext_small_75", "dims": (16,), "depths": (1,), "heads": (4,), "shared": (1,), "routed": (2,)}
MOH |= {"mlp_ratios": (2,), "sr_ratios": (1,)}
ROUTING = {"name": "mixer_vit_tiny", "mixer": "routing", "clusters": 2, "dims": (16,), "depths": (1,), "heads": 2}


@pytest.mark.parametrize(("key", "net"), [("load_balance", MOH), ("commitment", {**ROUTING, "patch_size": 4})])
def test_losses_of_layers_join_the_loss_and_want_such_layers(run, key, net):
    first = [run(f"{factor}", model=net, loss={key: factor})[1]["train_loss"] for factor in (0.0, 10.0)]
    assert first[1] > first[0]
    with pytest.raises(TrainError, match=f"loss.{key}: no layer of VisionTransformer has this loss"):
        run("none", model=VIT, loss={key: 0.1})


def test_bce_is_timms(make_recipe):
    logits, targets = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    recipe = load_recipe(make_recipe(loss={"kind": "bce", "threshold": 0.1}, augment={"smoothing": 0.2}))
    ours, theirs = choose_loss(recipe), BinaryCrossEntropy(0.2, target_threshold=0.1)
    assert ours(logits, targets) == theirs(logits, targets)
    hard = F.binary_cross_entropy_with_logits(logits, F.one_hot(targets, 3).float())
    assert ours(logits, targets) == pytest.approx(hard.item())  # 0.2 / 3 is below the threshold


class Labels(Dataset):
    """12 images with any number of 3 classes, which their colors tell."""

    def __init__(self, transform):
        self.transform = transform
        self.targets = [[float(i >> k & 1) for k in range(3)] for i in range(8)] + [[1.0, 0.0, 0.0]] * 4

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        color = tuple(int(200 * value) for value in self.targets[index])
        return Image.new("RGB", (20, 20), color), torch.tensor(self.targets[index])


@pytest.fixture
def labels(monkeypatch):
    monkeypatch.setattr("foveate.train.data.open_split", lambda data, split, transform, **kwargs: Labels(transform))


def test_images_with_any_number_of_classes_are_learned(run, labels):
    learner = {"name": "nat_mini", "dims": (32,), "depths": (1,), "kernel_size": 3}
    loss = {"kind": "bce", "multi_label": True}
    changes = {"model": learner, "loss": loss, "optimizer": {"lr": 1e-2}, "schedule": {"epochs": 8}}
    result, line = run("labels", **changes)
    first = read_scalars(result.log)[0]
    assert line["train_loss"] < 0.8 * first["train_loss"] and line["val_map"] > 80
    best = read_checkpoint(result.best_checkpoint)["meta"]["best"]
    assert best["map"] == max(record["val_map"] for record in read_scalars(result.log))
    assert evaluate(result.last_checkpoint).map == pytest.approx(line["val_map"])
    smoothed = run("smooth", **changes, augment={"smoothing": 0.2})[1]["train_loss"]
    mixed = run("mixed", **changes, augment={"mixup": 0.5})[1]["train_loss"]
    assert len({line["train_loss"], smoothed, mixed}) == 3


def test_targets_of_the_wrong_kind_are_refused(run, labels, make_recipe, monkeypatch, tmp_path):
    with pytest.raises(TrainError, match=r"data: an image has \(3,\) targets; set loss.multi_label"):
        run("single")
    monkeypatch.undo()
    with pytest.raises(
        TrainError, match=r"loss.multi_label wants 3 numbers from 0 to 1 per image, got targets of shape"
    ):
        run("multi", loss={"kind": "bce", "multi_label": True})


def test_average_precision_is_the_mean_of_precisions_at_the_hits():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.6], [0.7, 0.3, 0.7], [0.6, 0.4, 0.8]])
    targets = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert average_precision(scores, targets) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)  # the third has no image
    rows = judge(torch.tensor([[2.0, 1, 0]]), torch.tensor([[0.0, 1, 0]]))
    assert rows[0, :2].tolist() == [0, 1] and summarise(rows.tolist())["map"] == pytest.approx(100)


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(5)
    net = timm.create_model("test_resnet", num_classes=3)
    nn.init.normal_(net.fc.weight, std=0.5)
    torch.save(net.state_dict(), tmp_path / "teacher.pth")
    return {"teacher": "test_resnet", "checkpoint": str(tmp_path / "teacher.pth")}


def test_each_key_of_distillation_changes_the_loss_of_the_run(run, teacher):
    plain = run("plain")[1]["train_loss"]
    changed = [
        run(str(i), distill=teacher | more)[1]["train_loss"]
        for i, more in enumerate(({}, {"weight": 1.0}, {"temperature": 4.0}))
    ]
    assert len({plain, *changed}) == 4


def test_a_student_of_the_teacher_alone_gets_its_answers(run, teacher, make_recipe):
    """Weight 1, no labels: the loss falls towards 0, and the student's logits towards the teacher's."""
    changes = {"distill": teacher | {"weight": 1.0}, "optimizer": {"lr": 3e-3}, "schedule": {"epochs": 8}}
    result, line = run(
        "student", model={"name": "nat_mini", "dims": (32,), "depths": (1,), "kernel_size": 3}, **changes
    )
    assert line["train_loss"] < 0.5 * read_scalars(result.log)[0]["train_loss"]
    assert not any("teacher" in key for key in read_checkpoint(result.last_checkpoint)["state_dict"])


def test_a_run_can_be_the_teacher_and_the_student_is_averaged_without_it(run):
    first, _ = run("first")
    result, _ = run("second", distill={"teacher": "test_resnet", "checkpoint": str(first.best_checkpoint)}, ema=0.5)
    assert load_net(result.last_checkpoint)(torch.randn(1, 3, 16, 16)).shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "test_resnett"}, "distill.teacher: unknown model 'test_resnett'; did you mean test_resnet"),
        ({"checkpoint": "nowhere.pth"}, "distill: checkpoint nowhere.pth does not exist"),
        ({"checkpoint": None}, "one of distill.checkpoint and distill.pretrained"),
        ({"checkpoint": None, "pretrained": True}, "distill: the published test_resnet has 1000 classes, but"),
        ({"teacher": "test_vit"}, "distill: .* cannot be loaded into test_vit"),
        ({"weight": 0.0}, "distill.weight: wanted a number > 0 and <= 1"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_teacher_that_cannot_teach_is_refused(run, teacher, tmp_path, change, message):
    with pytest.raises(TrainError, match=message) as error:
        run("refused", distill=teacher | change)
    assert "\n" not in str(error.value) and not (tmp_path / "refused").exists()


def test_frozen_weights_and_their_statistics_stay_and_the_rest_trains(run, make_recipe):
    result, line = run("frozen", model={"freeze": ("*", "!fc.*", "!layer4.*")})
    torch.manual_seed(0)
    trained = net_weights(read_checkpoint(result.last_checkpoint))
    from foveate.train.images import seed_everything

    seed_everything(0)
    start = build_net(load_recipe(make_recipe())).state_dict()
    moved = {name for name, value in trained.items() if not torch.equal(value, start[name])}
    assert moved and all(name.startswith(("fc.", "layer4.")) for name in moved)
    assert line["train_loss"] != run("free")[1]["train_loss"]


@pytest.mark.parametrize(
    ("patterns", "message"), [(("stemm.*",), "'stemm.*' matches no parameter"), (("*",), "nothing is left to train")]
)
def test_patterns_that_freeze_nothing_or_all_are_refused(run, patterns, message):
    with pytest.raises(TrainError, match=f"model.freeze: {message.replace('*', '.')}"):
        run("refused", model={"freeze": patterns})


def test_recomputed_feature_maps_give_the_same_run_with_more_forward_passes(run, monkeypatch):
    calls = []
    forward = timm.models.vision_transformer.Block.forward
    monkeypatch.setattr(timm.models.vision_transformer.Block, "forward", lambda *a: (calls.append(1), forward(*a))[1])
    plain = run("plain", model=VIT | {"drop_path_rate": 0.5})[1]
    once, calls[:] = len(calls), []
    again = run("again", model=VIT | {"drop_path_rate": 0.5}, engine={"grad_checkpointing": True})[1]
    assert len(calls) > 1.5 * once
    assert again["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-6)


def test_channels_last_reaches_images_and_weights(run, monkeypatch):
    seen = []
    from foveate.train import model

    logits = model.Classifier.logits

    def watched(self, images):
        handle = self.net.register_forward_pre_hook(lambda net, args: seen.append(args[0].stride(1)))
        try:
            return logits(self, images)
        finally:
            handle.remove()

    monkeypatch.setattr(model.Classifier, "logits", watched)
    plain = run("plain")[1]
    assert set(seen) == {16 * 16}
    seen.clear()
    last = run("last", engine={"channels_last": True})[1]
    assert set(seen) == {1} and last["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


@pytest.mark.slow
def test_compilation_is_counted_and_gives_the_same_loss(run):
    plain = run("plain", model=VIT)[1]
    compiled = run("compiled", model=VIT, engine={"compile": "aot_eager"})[1]
    assert compiled["graphs"] >= 1 and "graphs" not in plain
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


def test_an_unknown_compiler_is_refused(run):
    with pytest.raises(TrainError, match=r"engine.compile: unknown backend 'inductr'; did you mean inductor"):
        run("refused", engine={"compile": "inductr"})


def test_synchronized_norms_are_wired_and_refused_where_they_cannot_run(make_recipe, run):
    recipe = load_recipe(make_recipe(engine={"sync_bn": True}))
    net = build_net(recipe)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    device = torch.device("meta")  # not a CPU; SyncBatchNorm's forward pass needs a GPU
    synced = prepare_net(net, recipe, device)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synced.modules()) == norms > 0
    with pytest.raises(TrainError, match=r"engine.sync_bn: torch's SyncBatchNorm needs GPUs, got cpu"):
        run("refused", engine={"sync_bn": True})
    with pytest.raises(TrainError, match=r"engine.sync_bn: test_vit has no BatchNorm"):
        vit = load_recipe(make_recipe(model=VIT, engine={"sync_bn": True}))
        prepare_net(build_net(vit), vit, device)


def test_sharding_wants_processes_and_refuses_what_it_cannot_do(run, make_recipe):
    with pytest.raises(TrainError, match=r"engine.parallel fsdp: .* start them with torchrun or srun"):
        run("refused", engine={"parallel": "fsdp"})
    for change, message in [
        ({"precision": "fp16"}, "fsdp: does not work with precision fp16"),
        ({"engine": {"parallel": "fsdp", "compile": "inductor"}}, "fsdp: does not work with engine.compile"),
        ({"optimizer": {"clip_grad": 1.0, "clip_mode": "agc"}}, "clip_mode agc needs whole weights"),
    ]:
        with pytest.raises(TrainError, match=message):
            load_recipe(make_recipe(**{"engine": {"parallel": "fsdp"}, **change}))


@pytest.mark.parametrize(("name", "keywords", "kind", "count"), [
    ("test_resnet", {}, {"BasicBlock", "Bottleneck"}, 4),
    ("nat_mini", {"dims": (16, 32), "head_dim": 8, "depths": (1, 2)}, None, 3),
])  # fmt: skip
def test_a_shard_is_a_residual_block(name, keywords, kind, count):
    blocks = residual_blocks(timm.create_model(name, **keywords))
    assert len(blocks) >= count and (kind is None or {type(block).__name__ for block in blocks} == kind)


def test_validation_comes_after_so_many_epochs_and_after_the_last(run):
    result, _ = run("rare", val_interval=2, schedule={"epochs": 5}, checkpoint={"keep": 9})
    lines = read_scalars(result.log)
    assert ["val_top1" in line for line in lines] == [False, True, False, True, True]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5] and len(list(result.work_dir.glob("epoch_*.pth"))) == 5


def test_tensorboard_gets_loss_rate_gradient_norm_and_validation(run):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result, line = run("board", log={"tensorboard": True, "interval": 2}, schedule={"epochs": 2})
    files = list((result.work_dir / "tensorboard").rglob("events*"))
    assert len(files) == 1
    events = tensorboard.EventAccumulator(str(files[0].parent))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/lr", "train/grad_norm", "val/top1", "val/loss"} <= set(tags), tags
    validated = events.Scalars("val/top1")
    assert len(validated) == 2 and validated[-1].value == pytest.approx(line["val_top1"])
    assert not list((run("none")[0].work_dir).glob("tensorboard"))


def test_freed_memory_is_kept_unless_the_caller_refuses(make_recipe, tmp_path, kept):
    train(make_recipe(schedule={"epochs": 1}), work_dir=tmp_path / "a")
    assert kept == ["train"]
    train(make_recipe(schedule={"epochs": 1}), work_dir=tmp_path / "b", keep_freed_memory=False)
    assert kept == ["train"]


def test_log_files_are_closed_after_an_error(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("foveate.train.loop.EpochLoop.run_epoch", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(make_recipe(), work_dir=tmp_path)
    open_logs = [h for h in logging._handlerList if (f := h()) and str(tmp_path) in getattr(f, "baseFilename", "")]
    assert all(h().stream is None for h in open_logs)
