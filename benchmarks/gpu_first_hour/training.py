"""Part d: training steps of whole models, eager and compiled."""

import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F

from .session import Session, first_line, say

MODELS = (
    "nat_tiny",
    "fv_davit_tiny",
    "davit_tiny",
    "biformer_tiny",
    "swin_tiny_patch4_window7_224",
    "resnet50",
    "dinat_tiny",
    "van_b1",
    "litv2_small",
    "fv_halonet_h1",
)
COMPILED = ("nat_tiny", "fv_davit_tiny", "davit_tiny", "biformer_tiny")
SMALL_MODELS = {"nat_mini": {"dims": (32, 64), "depths": (1, 1), "kernel_size": 3}}  # for the interpreter
CLASSES = 7
STEPS = 8


def training_steps(session: Session) -> None:
    batch, pixels = (session.batch, 224) if session.gpu else (2, 16)
    session.results["d"] = {}
    say(f"\n== d: one training step (forward, loss, backward, AdamW), batch {batch}, {pixels} px, autocast to")
    say(f"   {session.low}, channels last: images per second, GB at peak")
    for name in MODELS if session.gpu else SMALL_MODELS:
        if session.left() < (40 if session.gpu else 5):
            say("   out of time: the other models are left out")
            break
        try:
            _time_model(name, session, batch, pixels)
        except Exception as error:
            say(f"   {name}: RAISED {first_line(error)}")
    if not (session.compiles and session.gpu):
        return
    for name in COMPILED:
        if session.left() < 75:
            say("   out of time: the other compiled models are left out")
            break
        try:
            _time_compiled(name, session, batch, pixels)
        except Exception as error:
            say(f"   {name} compiled: RAISED {first_line(error)}")


def _time_model(name: str, session: Session, batch: int, pixels: int) -> None:
    if session.gpu:
        torch.cuda.reset_peak_memory_stats()
    step = _step(_model(name, session), session, batch, pixels)
    seconds, loss = _seconds_a_step(step, session)
    peak = torch.cuda.max_memory_allocated() / 2**30 if session.gpu else 0.0
    start = time.perf_counter()
    step()
    queueing = time.perf_counter() - start  # until the launches are queued, not until they are done
    session.sync()
    session.results["d"][name] = {"images/s": batch / seconds, "GB": peak, "queueing s": queueing, "loss": loss}
    say(
        f"   {name:30s} eager {batch / seconds:8.0f} images/s {1e3 * seconds:8.1f} ms"
        f" ({1e3 * queueing:6.1f} ms to queue) {peak:5.1f} GB  loss {loss:.3f}"
    )
    _free(session)


def _time_compiled(name: str, session: Session, batch: int, pixels: int) -> None:
    torch._dynamo.reset()
    model = _model(name, session)
    start = time.perf_counter()
    seconds, loss = _seconds_a_step(_step(torch.compile(model), session, batch, pixels), session)
    first = time.perf_counter() - start
    session.results["d"][f"{name} compiled"] = {"images/s": batch / seconds}
    say(
        f"   {name:30s} compiled {batch / seconds:8.0f} images/s {1e3 * seconds:8.1f} ms"
        f" (with compilation {first:.0f} s)  loss {loss:.3f}"
    )
    _free(session)


def _model(name: str, session: Session) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **({} if session.gpu else SMALL_MODELS[name]))
    return model.to(session.device, memory_format=torch.channels_last).train()


def _step(
    model: Callable[[torch.Tensor], torch.Tensor], session: Session, batch: int, pixels: int
) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=session.gpu)
    images = torch.randn(batch, 3, pixels, pixels, device=session.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,), device=session.device)

    def step() -> torch.Tensor:
        with torch.autocast(session.device, dtype=session.low):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def _seconds_a_step(step: Callable[[], torch.Tensor], session: Session) -> tuple[float, float]:
    """Return the seconds of a step after a few, and the last loss."""
    warmup, steps = (3, STEPS) if session.gpu else (0, 1)
    for _ in range(warmup):
        step()
    session.sync()
    start = time.perf_counter()
    for _ in range(steps):
        loss = step()
    session.sync()
    return (time.perf_counter() - start) / steps, float(loss.detach())


def _free(session: Session) -> None:
    if session.gpu:
        torch.cuda.empty_cache()
