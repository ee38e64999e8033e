"""Weights to start from: anything that this package writes, and what was dropped or resized is said."""

import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file

from foveate.export import load_model, save_hub
from foveate.train import TrainError, export_weights, load_net, load_recipe, train
from foveate.train.checkpoints import net_weights, read_checkpoint
from foveate.train.loading import trained_meta
from foveate.train.model import build_net

SMALL = {"name": "nat_mini", "dims": (16, 32), "depths": (1, 1), "head_dim": 8, "kernel_size": 3}
KEYWORDS = {key: value for key, value in SMALL.items() if key != "name"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    """A run of one epoch: its folder."""
    recipe = {
        "model": {**SMALL, "num_classes": 3}, "data": {"root": str(images), "img_size": 32, "workers": 0},
        "optimizer": {"lr": 1e-3}, "schedule": {"epochs": 1}, "batch_size": 4,
    }  # fmt: skip
    return train(recipe, work_dir=tmp_path_factory.mktemp("trained") / "run", device="cpu").work_dir


def build(make_recipe, source, said=None, **model):
    recipe = load_recipe(make_recipe(model={**SMALL, "num_classes": 3, "checkpoint": str(source), **model}))
    return build_net(recipe, (said if said is not None else []).append)


def sources(trained, folder):
    """The weights of a run, in every form that this package writes."""
    folder.mkdir()
    net = load_net(trained / "best.pth")
    save_hub(net, folder / "hub")
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, folder / "net.safetensors")
    export_weights(trained / "best.pth", folder / "net.pth")
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, folder / "ddp.pth")
    return [
        *(trained / name for name in ("best.pth", "epoch_1.pth")),
        *(folder / name for name in ("hub", "net.safetensors", "net.pth", "ddp.pth")),
        f"local-dir:{folder / 'hub'}",
    ]


def test_every_file_and_folder_of_ours_starts_a_run(make_recipe, trained, tmp_path):
    wanted = load_net(trained / "best.pth").state_dict()
    for source in sources(trained, tmp_path / "forms"):
        said: list[str] = []
        state = build(make_recipe, source, said).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in wanted.items()), source
        assert (
            len(said) == 1 and said[0].startswith("weights of ") and str(source).removeprefix("local-dir:") in said[0]
        )


def test_other_classes_keep_everything_but_the_classifier_and_say_so(make_recipe, trained, tmp_path):
    wanted = load_net(trained / "best.pth").state_dict()
    for source in sources(trained, tmp_path / "forms"):
        said: list[str] = []
        state = build(make_recipe, source, said, num_classes=5).state_dict()
        body = [key for key in wanted if not key.startswith("head.fc.")]
        assert all(torch.equal(wanted[key], state[key]) for key in body) and state["head.fc.weight"].shape[0] == 5
        assert said[1:] == ["their classifier of 3 classes is dropped, that of 5 classes starts at random"]


def test_a_backbone_without_classifier_starts_a_run(make_recipe, tmp_path):
    torch.manual_seed(1)
    torch.save(timm.create_model("nat_mini", num_classes=0, **KEYWORDS).state_dict(), tmp_path / "body.pth")
    said: list[str] = []
    net = build(make_recipe, tmp_path / "body.pth", said)
    assert torch.equal(net.stem.proj[0].weight, torch.load(tmp_path / "body.pth")["stem.proj.0.weight"])
    assert said[1:] == ["they have no classifier: that of 3 classes starts at random"]


def test_another_kernel_size_resizes_the_biases_and_says_so(make_recipe, trained):
    said: list[str] = []
    net = build(make_recipe, trained / "best.pth", said, kernel_size=5)
    assert net.stages[0].blocks[0].attn.rpb.shape[1:] == (9, 9)
    assert said[1].startswith("resized: stages.0.blocks.0.attn.rpb (2, 5, 5) -> (2, 9, 9)")


def test_a_larger_image_resizes_the_positions_of_a_vit(make_recipe, tmp_path):
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit", num_classes=3, img_size=64).state_dict(), tmp_path / "vit.pth")
    model = {"name": "test_vit", "num_classes": 3, "img_size": 96, "checkpoint": str(tmp_path / "vit.pth")}
    said: list[str] = []
    build_net(load_recipe(make_recipe(model=model)), said.append)
    assert said[1:] == ["resized: pos_embed (1, 17, 64) -> (1, 37, 64)"]


def test_grey_images_adapt_the_first_convolution_both_ways(make_recipe, trained, tmp_path):
    grey = {"in_chans": 1}
    data = {"mean": (0.5,), "std": (0.5,)}
    said: list[str] = []
    recipe = make_recipe(model={**SMALL, "num_classes": 3, "checkpoint": str(trained / "best.pth"), **grey}, data=data)
    net = build_net(load_recipe(recipe), said.append)
    wanted = load_net(trained / "best.pth").stem.proj[0].weight.sum(1, keepdim=True)
    torch.testing.assert_close(net.stem.proj[0].weight.data, wanted.detach())
    assert said[1:] == ["resized: stem.proj.0.weight (8, 3, 3, 3) -> (8, 1, 3, 3)"]
    torch.save(net.state_dict(), tmp_path / "grey.pth")
    assert build(make_recipe, tmp_path / "grey.pth", said).stem.proj[0].weight.shape[1] == 3


def test_an_official_layout_says_what_it_holds_beyond_the_model(make_recipe, golden, tmp_path):
    recorded, _ = golden("nat__nat_mini")
    state = {key: torch.zeros(shape) for key, shape, _ in recorded["state_dict"]}
    torch.save({**state, "levels.0.blocks.0.attn.relative_position_index": torch.zeros(2)}, tmp_path / "official.pth")
    said: list[str] = []
    model = {"name": "nat_mini", "num_classes": 7, "checkpoint": str(tmp_path / "official.pth"), "kernel_size": 9}
    build_net(load_recipe(make_recipe(model=model)), said.append)
    assert said[1] == "their classifier of 1000 classes is dropped, that of 7 classes starts at random"
    assert said[2].startswith("resized: rpb (2, 13, 13) -> (2, 17, 17)")
    assert said[3] == "not in the model, ignored: levels.0.blocks.0.attn.relative_position_index"


def test_adapters_in_a_checkpoint_are_merged(make_recipe, trained, images, tmp_path):
    recipe = {
        "model": {**SMALL, "num_classes": 3, "checkpoint": str(trained / "best.pth"), "lora": {"rank": 2}},
        "data": {"root": str(images), "img_size": 32, "workers": 0},
        "optimizer": {"lr": 0.05}, "schedule": {"epochs": 1}, "batch_size": 4,
    }  # fmt: skip
    run = train(recipe, work_dir=tmp_path / "lora", device="cpu")
    net, x = build(make_recipe, run.best_checkpoint), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net.eval()(x), load_net(run.best_checkpoint)(x))
    with pytest.raises(TrainError, match=r"holds a LoRA adapter without its model"):
        build(make_recipe, run.work_dir / "adapter")


@pytest.mark.parametrize("classes", [3, 9])
def test_weights_of_another_model_are_refused_whatever_the_number_of_classes(make_recipe, trained, tmp_path, classes):
    torch.save(timm.create_model("test_vit", num_classes=classes).state_dict(), tmp_path / "vit.pth")
    model = {"name": "test_resnet", "num_classes": 3, "checkpoint": str(tmp_path / "vit.pth")}
    with pytest.raises(TrainError, match=r"vit.pth does not fit test_resnet: it lacks conv1.0.weight"):
        build_net(load_recipe(make_recipe(model=model)))
    with pytest.raises(TrainError, match=r"best.pth, a checkpoint of nat_mini after 1 epochs does not fit nat_mini"):
        build(make_recipe, trained / "best.pth", dims=(32, 64))


def test_what_holds_no_weights_is_refused_with_what_to_name_instead(make_recipe, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained, tmp_path / "other")
    (tmp_path / "other" / "best.pth").unlink()
    for source, message in [
        (trained, "is a folder of checkpoints: name one of them, such as .*best.pth"),
        (tmp_path / "other", "such as .*epoch_1.pth"),
        (tmp_path / "empty", "is a folder; wanted a file, or a folder in timm's hub layout"),
        ("local-dir:nowhere", "nowhere does not exist, or is not a folder"),
        ("nowhere.pth", "nowhere.pth does not exist"),
        ("hf-hub:some/one", "does not exist"),
    ]:
        with pytest.raises(TrainError, match=message):
            build(make_recipe, source)


def test_a_wrong_keyword_is_not_blamed_on_the_file(make_recipe, trained):
    with pytest.raises(TrainError, match=r"unknown key model.depth: nat_mini does not have this argument"):
        build(make_recipe, trained / "best.pth", depth=3)


def test_a_trained_model_knows_its_classes_and_origin_and_no_longer_the_official_ones(trained):
    cfg = load_net(trained / "best.pth").pretrained_cfg
    assert cfg["label_names"] == ("ant", "bee", "cow") and cfg["input_size"] == (3, 32, 32)
    assert cfg["license"] == "unknown" and "trained by foveate" in cfg["description"]
    assert "from random weights: 1 of 1 epochs, top-1 " in cfg["description"]
    assert not {"url", "origin_url", "tag", "hf_hub_id"} & {key for key, value in cfg.items() if value}
    assert load_model("nat_mini").pretrained_cfg["license"] == "mit"


def test_only_checkpoints_of_a_run_have_meta_data(trained, tmp_path):
    assert trained_meta(trained / "best.pth")["epoch"] == 1
    torch.save({"meta": {"epoch": 1}, "state_dict": {}}, tmp_path / "mmengine.pth")
    (tmp_path / "damaged.pth").write_bytes(b"PK")
    for other in (tmp_path / "mmengine.pth", tmp_path / "damaged.pth", tmp_path / "none.pth", tmp_path, None, ""):
        assert trained_meta(other) is None


def test_a_checkpoint_of_a_model_of_fixed_size_is_loaded_at_another_size(images, tmp_path):
    recipe = {
        "model": {"name": "vit_tiny_patch16_224", "num_classes": 3, "img_size": 32, "depth": 1, "embed_dim": 48},
        "data": {"root": str(images), "img_size": 32, "workers": 0},
        "optimizer": {"lr": 1e-3}, "schedule": {"epochs": 1}, "batch_size": 4,
    }  # fmt: skip
    run = train(recipe, work_dir=tmp_path / "run", device="cpu")
    larger = load_net(run.best_checkpoint, img_size=64)
    assert larger(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert larger.pretrained_cfg["input_size"] == (3, 64, 64) and larger.pretrained_cfg["label_names"][0] == "ant"
    same = net_weights(read_checkpoint(run.best_checkpoint))
    assert torch.equal(larger.blocks[0].attn.qkv.weight, same["blocks.0.attn.qkv.weight"])
