"""Sparsifiner's two training phases: their losses, and what each of them trains.

Paper      Wei, Duggal, Lin, Liu, Urtasun 2023, arXiv:2303.13755. Weights of the losses are those of the authors' code.
Phase 1    5 epochs, learning rate 3e-4 -> 2e-4, 3 of warm-up: the predictors alone, `reconstruction_loss`.
Phase 2    45 epochs, 8e-5 -> 2e-6, 3 of warm-up: all but the predictors, `distillation_loss`.

    train_phase(student, 1)
    loss = reconstruction_loss(student, teacher, images)

The key `distill.phase` of a recipe trains a phase.

The teacher is the dense model, such as timm's deit_small_patch16_224, in eval mode. AdamW, weight decay 0.05, batch
1344 (168 on each of 8 GPUs), DeiT's augmentation, no drop path.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention_ops._attend import accumulator
from .sparsifiner import Sparsifiner

RECONSTRUCTION, KL, TOKENS = 0.01, 0.5, 0.5  # weights of the losses; that of the classification loss is 1
PHASES = (1, 2)


class DistillationLoss(NamedTuple):
    """The parts of phase 2's loss, weighted."""

    classes: Tensor
    logits: Tensor
    tokens: Tensor

    @property
    def total(self) -> Tensor:
        return self.classes + self.logits + self.tokens


def train_phase(student: Sparsifiner, phase: int) -> list[nn.Parameter]:
    """Set requires_grad of all parameters for a phase; return those that are trained.

    Raises:
        ValueError: the phase is neither 1 nor 2.
    """
    if phase not in PHASES:
        raise ValueError(f"train_phase: phase must be 1 (predictors) or 2 (backbone), got {phase!r}")
    of_predictors = {id(p) for p in student.predictor_parameters()}
    for parameter in student.parameters():
        parameter.requires_grad_((id(parameter) in of_predictors) == (phase == 1))
    return [p for p in student.parameters() if p.requires_grad]


def reconstruction_loss(
    student: Sparsifiner,
    teacher: nn.Module,
    images: Tensor,
    *,
    weight: float = RECONSTRUCTION,
    teacher_images: Tensor | None = None,
) -> Tensor:
    """Return phase 1's loss: how far the predictors' matrices are from the teacher's attention.

    The sum of squared differences over a batch's rows of patch tokens, mean over blocks, times `weight`. The student
    runs dense attention.

    Args:
        teacher: a ViT of timm with as many blocks, heads and tokens; runs without gradients.
        images: (B, C, H, W).
        teacher_images: the same images as the teacher takes them, with its mean and deviation; None: `images`.

    Raises:
        ValueError: teacher and student differ in blocks, heads or tokens.
    """
    matrices = attention_matrices(teacher, images if teacher_images is None else teacher_images)
    _, approximations = student.dense_features(images)
    wanted = [tuple(m[:, :, 1:].shape) for m in matrices]
    if wanted != [tuple(a.shape) for a in approximations]:
        raise ValueError(
            f"reconstruction_loss: the teacher's matrices must be {len(approximations)} of "
            f"{tuple(approximations[0].shape)}, got {len(wanted)} of {wanted[0] if wanted else ()}"
        )
    pairs = zip(approximations, matrices, strict=True)
    losses = [F.mse_loss(approximation, matrix[:, :, 1:], reduction="sum") for approximation, matrix in pairs]
    return weight * torch.stack(losses).mean()


def distillation_loss(
    student: Sparsifiner,
    teacher: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    logits_weight: float = KL,
    tokens_weight: float = TOKENS,
    teacher_images: Tensor | None = None,
) -> DistillationLoss:
    """Return phase 2's loss: classes, KL divergence of the logits from the teacher's, distance of the last tokens.

    Tokens that the student dropped are left out; the class token too.

    Args:
        teacher: a ViT of timm with the student's classes, tokens and channels; runs without gradients.
        images, targets: (B, C, H, W), and what `criterion` takes beside logits.
        teacher_images: the same images as the teacher takes them, with its mean and deviation; None: `images`.

    Raises:
        ValueError: teacher and student differ in classes, tokens or channels.
    """
    x, size = student.embed(images)
    state = student.last_state(x, size)
    features = student.finish(state)
    logits, tokens = _wide(student.forward_head(features)), _wide(features[:, 1:])
    wanted, of_teacher = _answers(teacher, images if teacher_images is None else teacher_images)
    whole = (len(images), size[0] * size[1], tokens.shape[2])
    if wanted.shape != logits.shape or of_teacher.shape != whole:
        raise ValueError(
            f"distillation_loss: the teacher's logits and tokens must be {tuple(logits.shape)} and {whole}, got "
            f"{tuple(wanted.shape)} and {tuple(of_teacher.shape)}"
        )
    if student.prunes:
        of_teacher = of_teacher.gather(1, state[1][..., None].expand(-1, -1, of_teacher.shape[2]))
    kl = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    return DistillationLoss(
        criterion(logits, targets), logits_weight * kl, tokens_weight * F.mse_loss(tokens, of_teacher)
    )


@torch.no_grad()
def _answers(teacher: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return a ViT's logits, and its tokens behind the last norm without the class token."""
    features = teacher.forward_features(images)
    return _wide(teacher.forward_head(features)), _wide(features[:, 1:])


def _wide(x: Tensor) -> Tensor:
    """Under autocast, losses are computed in float32."""
    return x.to(accumulator(x.dtype))


@torch.no_grad()
def attention_matrices(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the attention matrix of every block of a ViT of timm, (B, heads, N, N). Memory N * N a head.

    Raises:
        ValueError: the model has no blocks with timm's attention.
    """
    layers = [getattr(block, "attn", None) for block in getattr(model, "blocks", ())]
    if not layers or not all(hasattr(layer, "qkv") and hasattr(layer, "num_heads") for layer in layers):
        raise ValueError(f"attention_matrices: {type(model).__name__} has no blocks with an attention as in timm's ViT")
    seen: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]  # type: ignore[union-attr]
    try:
        model.forward_features(images)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    return [_matrix(layer, x) for layer, x in zip(layers, seen, strict=True)]


def _matrix(attention: Any, x: Tensor) -> Tensor:
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = getattr(attention, "q_norm", nn.Identity())(q), getattr(attention, "k_norm", nn.Identity())(k)
    return (torch.matmul(q, k.mT) * attention.scale).softmax(-1)
