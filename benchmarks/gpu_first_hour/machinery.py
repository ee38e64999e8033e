"""Part e: what only a GPU shows of torch's machinery around the kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from ... import attention_ops as ops
from .inputs import normal
from .session import Session, first_line, say

LEAST_SECONDS = 30.0  # that must be left before a check starts


class Machinery:
    """Small inputs, and one method a check; each returns what it found."""

    def __init__(self, session: Session) -> None:
        self.session, self.device = session, session.device
        shape = (2, 14, 14, 3, 2, 32) if session.gpu else (1, 5, 5, 3, 1, 16)
        self.kernel = 7 if session.gpu else 3
        self.packed = normal(*shape, device=self.device, dtype=session.low)
        self.layer = ops.NeighborhoodAttention2d(64, 2, self.kernel).to(self.device)
        self.map = normal(*((2, 14, 14, 64) if session.gpu else (1, 5, 6, 64)), device=self.device)

    def attend(self, packed: Tensor, **kwargs) -> Tensor:
        return ops.neighborhood_attention(*packed.unbind(3), self.kernel, **{"impl": "fused"} | kwargs)

    def table(self) -> Tensor:
        side = 2 * self.kernel - 1
        return normal(self.packed.shape[4], side, side, device=self.device)

    def reduce_overhead(self) -> str:
        """CUDA graphs of torch.compile: nothing that a call made may stay in their memory."""
        torch._dynamo.reset()
        compiled, sums = torch.compile(self.layer, mode="reduce-overhead"), []
        for _ in range(4):
            out = compiled(self.map)
            out.float().square().mean().backward()
            sums.append(float(out.detach().float().abs().sum()))
            self.layer.zero_grad()
        return "fine" if max(sums) - min(sums) < 1e-2 * max(sums) else f"outputs differ: {sums}"

    def replay_after_other_sizes(self) -> str:
        """A captured graph reads nothing that calls of other sizes replace."""
        rpb = self.table()
        want = self.attend(self.packed, rpb=rpb).clone()
        self.session.sync()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.attend(self.packed, rpb=rpb)
        graph.replay()
        self.session.sync()
        before = float((out - want).abs().max())
        for side in range(15, 95):  # as a detector's multi-scale training meets them
            other = normal(1, side, side, *self.packed.shape[3:], device=self.device, dtype=self.packed.dtype)
            self.attend(other, rpb=rpb)
        counts = (1, 2, 4, 8, 16, 64, 1024)
        reused = [torch.full((n,), 2**26, dtype=torch.int32, device=self.device) for n in counts for _ in range(300)]
        graph.replay()
        self.session.sync()
        del reused
        return f"error before {before:.1e}, after {float((out - want).abs().max()):.1e}"

    def another_stream(self) -> bool:
        want, stream = self.attend(self.packed), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = self.attend(self.packed)
        self.session.sync()
        return torch.equal(found, want)

    def second_device(self) -> str:
        if torch.cuda.device_count() < 2:
            return "one GPU here"
        return str(self.attend(self.packed.to("cuda:1"), rpb=self.table().to("cuda:1")).device)

    def deterministic_algorithms(self) -> str:
        region = 2 if self.session.gpu else 5
        torch.use_deterministic_algorithms(True)
        try:
            packed = self.packed.clone().requires_grad_()
            q, k, v = packed.unbind(3)
            routes = ops.bi_level_routes(q, k, region_size=region, topk=1)
            ops.routed_attention(q, k, v, routes, region_size=region, impl="fused").float().sum().backward()
            self.layer(self.map).sum().backward()
            halo = ops.HaloAttention2d(16, heads=2, block_size=4, halo=1).to(self.device)
            halo(normal(1, 16, 8, 8, device=self.device)).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        return "fine"

    def strip_gate_in_autocast(self) -> str:
        gate = ops.EfficientLocalAttention(16).to(self.device)
        with torch.autocast(self.device, dtype=self.session.low):
            gate(normal(2, 16, 8, 8, device=self.device).requires_grad_()).float().mean().backward()
        return "fine"

    def forward_mode(self) -> str:
        """The kernels have no forward-mode derivative, and must say so."""
        packed = self.packed.float()
        try:
            torch.func.jvp(lambda x: self.attend(x).float().sum(), (packed,), (packed,))
        except NotImplementedError as error:
            return first_line(error)
        return "WRONG: not refused"

    def second_derivative(self) -> str:
        """The kernels can be differentiated once, and must say so."""
        packed = self.packed.clone().requires_grad_()
        try:
            (grad,) = torch.autograd.grad(self.attend(packed).float().sum(), packed, create_graph=True)
            grad.sum().backward()
        except NotImplementedError as error:
            return first_line(error)
        return "WRONG: not refused"

    def same_bits(self) -> bool:
        return torch.equal(self.layer(self.map), self.layer(self.map))


def machinery(session: Session) -> None:
    say("\n== e: CUDA graphs, streams, devices, deterministic mode, autocast, derivatives that must be refused")
    session.results["e"] = {}
    at_hand = Machinery(session)
    checks: dict[str, Callable[[], object]] = {}
    if session.gpu:
        if session.compiles:
            checks["torch.compile(mode='reduce-overhead')"] = at_hand.reduce_overhead
        checks["a replayed CUDA graph after 80 other map sizes"] = at_hand.replay_after_other_sizes
        checks["another stream gives the same bits"] = at_hand.another_stream
        checks["a second device"] = at_hand.second_device
    checks["deterministic algorithms, backward"] = at_hand.deterministic_algorithms
    checks["strip gate, backward inside autocast"] = at_hand.strip_gate_in_autocast
    checks["forward-mode derivative is refused"] = at_hand.forward_mode
    checks["second derivative is refused"] = at_hand.second_derivative
    checks["two runs give the same bits"] = at_hand.same_bits
    for name, check in checks.items():
        if session.left() < LEAST_SECONDS:
            say("   out of time: the other checks are left out")
            return
        try:
            found = str(check())
        except Exception as error:
            found = f"RAISED {first_line(error)}"
        session.results["e"][name] = found
        say(f"   {name:50s} {found}")
