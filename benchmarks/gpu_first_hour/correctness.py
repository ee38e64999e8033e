"""Part a: the fused forward and every gradient against the definition in float64."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .cases import full_cases, small_cases
from .inputs import BF16, FP16, FP32, Case
from .session import Session, first_line, say

# Largest error of the output and of the gradients, as a share of the largest value of each.
LIMITS = {FP32: (3e-5, 1e-4), FP16: (2e-3, 4e-3), BF16: (1.2e-2, 2.5e-2)}
MOST_SECONDS = 150.0


def correctness(session: Session) -> None:
    say(f"\n== a: forward and every gradient against float64, as a share of the largest value; limits {LIMITS}")
    cases = [case for case in (full_cases() if session.gpu else small_cases()) if session.only in case.name]
    deadline = time.perf_counter() + min(MOST_SECONDS, session.left() * 0.45)
    rows = []
    for number, case in enumerate(cases):
        if time.perf_counter() > deadline:
            say(f"   out of time: {len(cases) - number} cases left out")
            break
        torch.manual_seed(number)
        rows.append(row := _try(case, session))
        if row["bad"]:
            say(f"   BAD {row['name']}: {row['bad']}; errors " + " ".join(f"{e:.1e}" for e in row["errors"]))
        if row.get("lost"):
            say("   the CUDA context is lost: run the other parts again")
            break
    worst: dict[str, float] = {}
    for row in rows:
        if not row["bad"]:
            key = f"{row['op']} {row['dtype']}"
            worst[key] = max(worst.get(key, 0.0), *row["errors"])
    words = "; ".join(f"{name} {error:.0e}" for name, error in sorted(worst.items()))
    say(f"   {len(rows)} cases, {sum(bool(row['bad']) for row in rows)} bad. Worst error of the good ones: {words}")
    session.results["a"] = rows


def _try(case: Case, session: Session) -> dict:
    dtype = str(case.dtype).removeprefix("torch.")
    row = {"name": f"{case.name} {dtype}", "op": case.op, "dtype": dtype, "errors": [], "bad": ""}
    try:
        row["errors"], row["bad"] = _errors(case, session)
    except Exception as error:
        row["bad"] = first_line(error)
        row["lost"] = "illegal" in str(error) or "device-side" in str(error)
    return row


def _errors(case: Case, session: Session) -> tuple[list[float], str]:
    """Return the errors of the output and of every gradient, and what is wrong or nothing."""
    leaves, ours, exact = case.make(session.device)
    truth_leaves = [x.double() for x in leaves]
    bad = []
    with torch.no_grad():
        probe = torch.randn_like(exact(truth_leaves))
    found, truth = results(ours, leaves, probe), results(exact, truth_leaves, probe)
    if not all(map(torch.equal, found, results(ours, leaves, probe))):
        bad.append("two runs differ")
    session.sync()
    errors = [
        float((f.double() - t).abs().max() / t.abs().max().clamp(min=1e-3)) for f, t in zip(found, truth, strict=True)
    ]
    tf32 = 3 if case.dtype == FP32 and torch.backends.cuda.matmul.allow_tf32 else 1
    of_output, of_gradients = LIMITS[case.dtype]
    if not all(f.isfinite().all() for f in found):
        bad.append("not finite")
    if errors[0] > of_output or max(errors[1:], default=0.0) > of_gradients * tf32:
        bad.append("too far from the definition")
    return errors, ", ".join(bad)


def results(call: Callable[[list[Tensor]], Tensor], leaves: list[Tensor], probe: Tensor) -> list[Tensor]:
    """Return the output and the gradients of all leaves for the output gradient `probe`."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = call(leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, probe.to(out.dtype))]
