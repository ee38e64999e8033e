"""All keys of a recipe, with their meaning, unit and default.

A key that has no effect (a switch probability without both mixes) is refused like an unknown key.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .._model_args import FEATURE_ARGS, check_model_args
from .errors import TrainError
from .policies import check_policy
from .schema import limited, read

STREAMS = ("wds", "hfids")
Precision = Literal["fp32", "bf16", "fp16"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters: y = W x + alpha / rank * B A x. Everything else keeps its weights, but for the classifier."""

    rank: int = limited(8, at_least=1, at_most=4096)
    alpha: float = limited(16.0, above=0)
    dropout: float = limited(0.0, at_least=0, below=1)
    # Shell patterns of names of linear layers and of convolutions without groups, such as ("*.qkv", "*.proj").
    targets: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class ModelRecipe:
    """A timm model; a recipe writes the keywords (dims, depths, ...) beside the name."""

    name: str
    num_classes: int = limited(1000, at_least=2)
    in_chans: Literal[1, 3] = 3
    drop_path_rate: float | None = limited(None, at_least=0, below=1)
    pretrained: bool = False  # the weights that timm knows for the name
    # Weights to start from: a checkpoint of a run, a file in the official layout or ours, or a folder in hub layout.
    checkpoint: str | None = None
    lora: LoraRecipe | None = None  # train adapters and the classifier only
    # Shell patterns of whole parameter names that do not train, in order; "!" takes names out again: ("*", "!head.*").
    freeze: tuple[str, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            check_model_args(self.keywords, "model")
        except ValueError as error:
            raise TrainError(str(error)) from error
        if features := sorted(FEATURE_ARGS & set(self.keywords)):
            raise TrainError(f"model.{features[0]}: a recipe trains a classifier, not a feature extractor")
        if self.pretrained and self.checkpoint:
            raise TrainError("model.checkpoint: starts from a file, but model.pretrained is True; give one of the two")


@dataclass(frozen=True)
class DataRecipe:
    """The data set, and the preprocessing without augmentation."""

    # "folder" (class folders, or one .tar or .tar.gz per split), "list" (one .csv or .txt per split), "mnist5k", or of
    # timm torch/NAME, hfds/NAME, and the streams wds/ and hfids/NAME.
    source: str = "folder"
    root: str | None = None
    class_map: str | None = None  # text file with a class name a line, in the order of the indices; None: sorted names
    image_key: str | None = None  # column of the images (list, hfds, hfids), or suffixes (wds); None: the reader's own
    label_key: str | None = None  # column of the labels (list, hfds, hfids), or field of the JSON file (wds)
    train_samples: int | None = limited(None, at_least=1)  # images of a stream, where it does not tell
    val_samples: int | None = limited(None, at_least=1)
    train_split: str = "train"
    val_split: str = "validation"
    img_size: int | tuple[int, int] = limited(224, at_least=1, at_most=8192)  # px; (rows, columns) if not square
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = limited((0.229, 0.224, 0.225), above=0)
    interpolation: Interpolation = "bicubic"
    train_interpolation: Interpolation | Literal["random"] | None = None  # None: as for validation
    crop_pct: float = limited(0.875, at_least=0.1, at_most=1)  # share of the resized side that the center crop keeps
    workers: int = limited(4, at_least=0, at_most=1024)  # loader processes per training process
    max_unreadable: int = limited(100, at_least=0)  # files that may be unreadable, per split and process

    @property
    def kind(self) -> str:
        """Return the source without the name of a data set: folder, list, mnist5k, torch, hfds, wds, hfids."""
        return self.source.partition("/")[0]

    @property
    def streams(self) -> bool:
        """Say whether images come in the order of the source: there is no access by index."""
        return self.kind in STREAMS

    def __post_init__(self) -> None:
        columns = self.kind in ("list", "hfds", *STREAMS)
        _needs("data.image_key", self.image_key, "a data.source with columns (list, hfds/, hfids/, wds/)", columns)
        _needs("data.label_key", self.label_key, "a data.source with columns (list, hfds/, hfids/, wds/)", columns)
        _needs("data.train_samples", self.train_samples, "a stream (hfids/, wds/) as data.source", self.streams)
        _needs("data.val_samples", self.val_samples, "a stream (hfids/, wds/) as data.source", self.streams)
        named = self.kind not in ("mnist5k", "torch")
        _needs("data.class_map", self.class_map, "a data.source of files (not mnist5k, torch/)", named)


@dataclass(frozen=True)
class AugmentRecipe:
    """Augmentation of training images. Everything is off by default; probabilities are per image."""

    randaugment: str | None = None  # timm's string, such as rand-m9-mstd0.5-inc1
    color_jitter: float = limited(0.0, at_least=0)
    hflip: float = limited(0.0, at_least=0, at_most=1)
    scale: tuple[float, float] | None = limited(None, above=0, at_most=1)  # random resized crop: share of the area
    ratio: tuple[float, float] | None = limited(None, above=0)  # of the random crop; None: 3/4 to 4/3
    rotate: float = limited(0.0, at_least=0, at_most=180)  # degrees, in both directions
    shift: float = limited(0.0, at_least=0, below=1)  # share of the side, in both directions, rows and columns
    zoom: float = limited(0.0, at_least=0, below=1)  # 0.1: 0.9 to 1.1 times the size
    erasing: float = limited(0.0, at_least=0, at_most=1)
    erasing_mode: Literal["pixel", "rand", "const"] | None = None  # None: pixel
    mixup: float = limited(0.0, at_least=0)  # alpha of the beta distribution
    cutmix: float = limited(0.0, at_least=0)
    mix_prob: float | None = limited(None, above=0, at_most=1)  # probability to mix a batch; None: 1
    switch_prob: float | None = limited(None, above=0, below=1)  # probability of cutmix if both are on; None: 0.5
    mixup_off_epoch: int | None = limited(None, at_least=1)  # epochs after which nothing is mixed any more
    smoothing: float = limited(0.0, at_least=0, below=1)
    repeats: int = limited(1, at_least=1)  # repeated augmentation: views per image; the epoch keeps its length

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def __post_init__(self) -> None:
        _needs("augment.ratio", self.ratio, "augment.scale", self.scale)
        _needs("augment.erasing_mode", self.erasing_mode, "augment.erasing", self.erasing)
        _needs("augment.mix_prob", self.mix_prob, "augment.mixup or augment.cutmix", self.mixes)
        _needs("augment.switch_prob", self.switch_prob, "augment.mixup and augment.cutmix", self.mixup * self.cutmix)
        _needs("augment.mixup_off_epoch", self.mixup_off_epoch, "augment.mixup or augment.cutmix", self.mixes)
        if self.randaugment is not None:
            check_policy(self.randaugment)
        for name in ("scale", "ratio"):
            if (pair := getattr(self, name)) and pair[0] > pair[1]:
                raise TrainError(f"augment.{name}: wanted (low, high), got {pair}")
        if self.color_jitter and self.randaugment:
            raise TrainError("augment.color_jitter: timm skips it with augment.randaugment; give one of the two")


@dataclass(frozen=True)
class OptimizerRecipe:
    """Arguments of timm.optim.create_optimizer_v2.

    Biases, norms and no_weight_decay() names have no weight decay, unless also_decay names them.
    """

    lr: float = limited(above=0)  # for the global batch; it is not rescaled
    opt: str = "adamw"
    weight_decay: float = limited(0.0, at_least=0)
    # Shell patterns of whole names of parameters that have weight decay too: ("*.rpb",), or ("*",) for all of them.
    also_decay: tuple[str, ...] = ()
    betas: tuple[float, float] | None = limited(None, at_least=0, below=1)
    eps: float | None = limited(None, above=0)
    momentum: float | None = limited(None, at_least=0, below=1)
    layer_decay: float | None = limited(None, above=0, at_most=1)
    # Shell patterns of whole parameter names to factors of lr, such as {"*.conv_offset.weight": 0.01}. A factor scales
    # the rate that the schedule decays from; warmup_lr and min_lr are the same for every parameter.
    lr_mult: dict[str, Any] = field(default_factory=dict)
    clip_grad: float | None = limited(None, above=0)
    clip_mode: Literal["norm", "value", "agc"] | None = None  # None: norm; agc: relative to each unit, not the head

    def __post_init__(self) -> None:
        _needs("optimizer.clip_mode", self.clip_mode, "optimizer.clip_grad", self.clip_grad)
        _needs("optimizer.also_decay", self.also_decay or None, "optimizer.weight_decay", self.weight_decay)
        for pattern, factor in self.lr_mult.items():
            if type(factor) not in (int, float) or not 0 < factor < math.inf or factor == 1:
                raise TrainError(f"optimizer.lr_mult: wanted numbers > 0 other than 1, got {factor!r} for {pattern!r}")


@dataclass(frozen=True)
class ScheduleRecipe:
    """Learning rate, as in timm: the decay starts at epoch 0, the warm-up replaces its first part."""

    epochs: int = limited(at_least=1)  # of the decay, warm-up included
    kind: Literal["cosine", "linear", "step", "constant"] = "cosine"
    per: Literal["iteration", "epoch"] = "iteration"  # how often the rate changes; timm's t_in_epochs is "epoch"
    delay_epochs: int = limited(0, at_least=0)  # the schedule starts so many epochs late, at its first rate
    step_epochs: int | None = limited(None, at_least=1)  # kind "step": epochs between two steps
    step_rate: float | None = limited(None, above=0, below=1)  # kind "step": factor of the rate at each step
    warmup_epochs: float = limited(0.0, at_least=0)
    warmup_lr: float | None = limited(None, at_least=0)  # rate at the start of the warm-up; None: 0
    min_lr: float = limited(0.0, at_least=0)
    cooldown_epochs: int = limited(0, at_least=0)  # at the last rate (min_lr but for steps), after the decay

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.cooldown_epochs

    def __post_init__(self) -> None:
        _needs("schedule.warmup_lr", self.warmup_lr, "schedule.warmup_epochs", self.warmup_epochs)
        for key, value in (("schedule.step_epochs", self.step_epochs), ("schedule.step_rate", self.step_rate)):
            _needs(key, value, 'schedule.kind "step"', self.kind == "step")
            if self.kind == "step" and value is None:
                raise TrainError(f'missing key {key}: schedule.kind "step" wants it')
        _needs("schedule.min_lr", self.min_lr or None, "a kind that decays", self.kind != "constant")
        if self.warmup_epochs >= self.epochs:
            raise TrainError(
                f"schedule.warmup_epochs: wanted fewer than {self.epochs} epochs, got {self.warmup_epochs:g}"
            )


@dataclass(frozen=True)
class CheckpointRecipe:
    interval: int = limited(1, at_least=1)  # epochs; the last epoch is always saved
    keep: int = limited(2, at_least=1)  # newest files that are kept; best.pth is kept too
    every_minutes: float | None = limited(None, above=0)  # within an epoch too, after an optimizer step


@dataclass(frozen=True)
class LogRecipe:
    interval: int = limited(50, at_least=1)  # iterations between lines of the detailed log
    tensorboard: bool = False  # loss, rate, gradient norm and validation for TensorBoard; needs foveate[tensorboard]


@dataclass(frozen=True)
class LossRecipe:
    """The loss of the logits; augment.smoothing applies to both kinds."""

    kind: Literal["cross_entropy", "bce"] = "cross_entropy"
    threshold: float | None = limited(None, at_least=0, below=1)  # bce: soft targets above it count as 1, others as 0
    multi_label: bool = False  # bce: an image has any number of classes; its target is a number per class
    load_balance: float = limited(0.0, at_least=0)  # factor of the loss of uneven heads, for mixtures of heads (MoH)
    commitment: float = limited(0.0, at_least=0)  # factor of the distance from centroids, for routing attention
    branches: bool = False  # dcal: the losses of all branches, pairs of images included, in learned proportions

    def __post_init__(self) -> None:
        _needs("loss.threshold", self.threshold, 'loss.kind "bce"', self.kind == "bce")
        _needs("loss.multi_label", self.multi_label or None, 'loss.kind "bce"', self.kind == "bce")


@dataclass(frozen=True)
class DistillRecipe:
    """Learn a teacher's logits too: (1 - weight) * loss + weight * temperature**2 * KL(teacher, model).

    With `phase`, the losses of a training phase of Sparsifiner, weighted as in the paper; it decides what trains.
    """

    teacher: str  # a timm model with as many classes
    pretrained: bool = False  # the weights that timm knows for the teacher
    checkpoint: str | None = None  # or a file: a checkpoint of a run, or weights in the official layout or ours
    weight: float = limited(0.5, above=0, at_most=1)
    temperature: float = limited(1.0, above=0)
    # Sparsifiner. 1: its predictors learn the teacher's attention matrices, labels are not used; 2: all else learns
    # the classes, and the teacher's logits and last tokens.
    phase: Literal[1, 2] | None = None

    def __post_init__(self) -> None:
        if self.pretrained == (self.checkpoint is not None):
            raise TrainError("distill: name the teacher's weights by one of distill.checkpoint and distill.pretrained")
        for key, other in (("weight", 0.5), ("temperature", 1.0)):
            if self.phase is not None and (value := getattr(self, key)) != other:
                raise TrainError(f"distill.{key}: has no effect with distill.phase, got {value!r}")


@dataclass(frozen=True)
class EngineRecipe:
    """How a step is computed; the result is the same but for rounding."""

    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights and optimizer states are divided among the processes
    compile: str | None = None  # backend of torch.compile, such as inductor
    channels_last: bool = False  # NHWC in memory, which suits convolutions on GPUs
    grad_checkpointing: bool = False  # feature maps are recomputed in the backward pass: less memory, more time
    sync_bn: bool = False  # statistics of BatchNorm over all processes; GPUs only


@dataclass(frozen=True)
class Recipe:
    """One training run. `batch_size` is per process; global batch = batch_size x accumulate x processes."""

    model: ModelRecipe
    data: DataRecipe
    optimizer: OptimizerRecipe
    schedule: ScheduleRecipe
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    batch_size: int = limited(128, at_least=1)
    global_batch: int | None = limited(None, at_least=1)  # for which optimizer.lr was chosen; None: not known
    accumulate: int = limited(1, at_least=1)
    precision: Precision = "fp32"
    ema: float | None = limited(None, above=0, below=1)  # decay of the weight averages per optimizer step
    ema_warmup: bool | None = None  # None: True; after n steps the decay is at most 1 - n ** (-2/3), as in timm
    val_interval: int = limited(1, at_least=1)  # epochs; the last epoch is always validated
    seed: int = limited(0, at_least=0, at_most=2**32 - 1)  # NumPy's limit
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    distill: DistillRecipe | None = None
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    hooks: tuple[dict[str, Any], ...] = ()  # additional MMEngine hooks: {"type": registered name, arguments}

    def __post_init__(self) -> None:
        for key in ("mean", "std"):
            if len(values := getattr(self.data, key)) != self.model.in_chans:
                raise TrainError(f"data.{key}: wanted {self.model.in_chans} value(s), one per channel, got {values}")
        if self.schedule.min_lr > self.optimizer.lr:
            raise TrainError(
                f"schedule.min_lr: wanted at most optimizer.lr {self.optimizer.lr:g}, got {self.schedule.min_lr:g}"
            )
        for pattern, factor in self.optimizer.lr_mult.items():
            top = self.optimizer.lr * factor
            if top < 0.999 * self.schedule.min_lr:  # rounding of products of decimals
                raise TrainError(
                    f"optimizer.lr_mult: {pattern!r} decays from {top:g}, wanted at least schedule.min_lr "
                    f"{self.schedule.min_lr:g}"
                )
        self._check_together()
        if self.augment.mixes and self.batch_size % 2:
            raise TrainError(f"batch_size: mixup and cutmix pair images, wanted an even number, got {self.batch_size}")

    def _check_together(self) -> None:
        """Refuse keys of different sections that contradict each other."""
        _needs("ema_warmup", self.ema_warmup, "ema", self.ema)
        warmup_lr, off, epochs = self.schedule.warmup_lr, self.augment.mixup_off_epoch, self.schedule.total_epochs
        if warmup_lr is not None and warmup_lr > self.optimizer.lr:
            raise TrainError(
                f"schedule.warmup_lr: wanted at most optimizer.lr {self.optimizer.lr:g}, got {warmup_lr:g}"
            )
        if off is not None and off >= epochs:
            raise TrainError(f"augment.mixup_off_epoch: has no effect in a run of {epochs} epochs, got {off}")
        if self.engine.parallel == "fsdp":
            for key, given in (("precision fp16", self.precision == "fp16"), ("engine.compile", self.engine.compile)):
                if given:
                    raise TrainError(f"engine.parallel fsdp: does not work with {key}")
            if self.optimizer.clip_mode == "agc":
                raise TrainError("engine.parallel fsdp: clip_mode agc needs whole weights; use norm or value")
        if self.distill is not None and self.loss.multi_label:
            raise TrainError("distill: compares distributions over classes, which loss.multi_label does not have")
        if self.distill is not None and self.distill.phase is not None:
            self._check_phase(self.distill.phase)

    def _check_phase(self, phase: int) -> None:
        """Refuse keys that do not work with a phase of Sparsifiner, or have no effect in it."""
        others = {
            "engine.parallel fsdp": self.engine.parallel == "fsdp",
            "engine.compile": self.engine.compile,
            "engine.grad_checkpointing": phase == 1 and self.engine.grad_checkpointing,
            "loss.load_balance": self.loss.load_balance,
            "loss.commitment": self.loss.commitment,
            "loss.branches": self.loss.branches,
            'loss.kind "bce"': phase == 1 and self.loss.kind == "bce",
        }
        for key, given in others.items():
            if given:
                raise TrainError(f"distill.phase {phase}: does not work with {key}")


def read_recipe(data: dict[str, Any]) -> Recipe:
    """Check plain data, the content of a recipe file, and return the recipe."""
    model = data.get("model") if isinstance(data, dict) else None
    if isinstance(model, dict):
        own = set(ModelRecipe.__dataclass_fields__)
        keywords = {k: _as_tuples(v) for k, v in model.items() if k not in own}
        model = {k: v for k, v in model.items() if k in own and k != "keywords"} | {"keywords": keywords}
        data = data | {"model": model}
    return read(Recipe, data)


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """Return plain data from which `read_recipe` makes an equal recipe."""
    data = asdict(recipe)
    return data | {"model": {**data["model"].pop("keywords"), **data["model"]}}


def _needs(key: str, value: object, other: str, switch: object) -> None:
    if value is not None and not switch:
        raise TrainError(f"{key}: has no effect without {other}, got {value!r}")


def _as_tuples(value: object) -> object:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value
