"""What every op promises: the cases are in ops.py, and an op without a case fails here."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from ops import CASES
from torch import nn
from torch.utils import _pytree as pytree

import foveate
from foveate.attention_ops import Impl
from foveate.attention_ops._op import OPS, declare
from foveate.attention_ops.macs import count_macs

every_case = pytest.mark.parametrize("name", CASES)
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
OF_OTHERS = {"bi_level_routes"}  # an op without bodies to choose from
OPAQUE = [name for name, case in CASES.items() if OPS[case.name].graph is not OPS[case.name].bodies[Impl.TILED]]
KERNELS = Path(foveate.__file__).parent / "kernels"


def test_every_op_has_a_case():
    missing = set(OPS) - {case.name for case in CASES.values()}
    assert missing == set(), f"add a Case of {missing} to tests/ops.py"


def test_every_registered_op_is_declared_or_a_kernels():
    registered = {
        n.removeprefix("foveate::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("foveate::")
    }
    kernels = set(re.findall(r'custom_op\("foveate::(\w+)"', "".join(f.read_text() for f in KERNELS.rglob("*.py"))))
    names = {name.partition(".")[0] for name in registered} - kernels - OF_OTHERS
    assert names == set(OPS) | {f"_{CASES[name].name}" for name in OPAQUE}


@every_case
def test_opcheck(name):
    op, args, kwargs = CASES[name].op_call()
    assert torch.library.opcheck(op, args, kwargs, test_utils=CHECKS) == dict.fromkeys(CHECKS, "SUCCESS")


@pytest.mark.parametrize("name", OPAQUE)
def test_opcheck_of_what_compilers_call(name):
    _, _, kwargs = CASES[name].op_call()
    kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, kwargs)
    if "scale" in kwargs and kwargs["scale"] is None:
        kwargs["scale"] = 0.5  # chosen by then
    op = getattr(torch.ops.foveate, f"_{CASES[name].name}").default
    kwargs.pop("impl", None)
    assert torch.library.opcheck(op, (), kwargs, test_utils=CHECKS) == dict.fromkeys(CHECKS, "SUCCESS")


def test_opcheck_of_routes():
    args, kwargs = (torch.randn(1, 6, 8, 2, 4), torch.randn(1, 6, 8, 2, 4)), {"region_size": [3, 4], "topk": 2}
    results = torch.library.opcheck(torch.ops.foveate.bi_level_routes.default, args, kwargs, test_utils=CHECKS)
    assert results == dict.fromkeys(CHECKS, "SUCCESS")


@every_case
def test_the_schema_is_the_public_signature(name):
    arguments = CASES[name].op_call()[0]._schema.arguments
    parameters = inspect.signature(CASES[name].op).parameters.values()
    assert [a.name for a in arguments] == [p.name for p in parameters]
    assert [a.kwarg_only for a in arguments] == [p.kind is p.KEYWORD_ONLY for p in parameters]
    assert [a.has_default_value() for a in arguments] == [p.default is not p.empty for p in parameters]


@every_case
def test_the_compiled_op_agrees_with_every_gradient(name):
    case, found = CASES[name], []
    torch._dynamo.reset()
    for call in (torch.compile(case.call, fullgraph=True, backend="aot_eager"), case.call):
        tensors = case.tensors()
        out = call(*tensors)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    torch.testing.assert_close(*found)


@every_case
def test_bodies_agree_with_every_gradient(name):
    case, found = CASES[name], []
    for impl in ("reference", "tiled"):
        tensors = case.tensors()
        out = case.call(*tensors, impl=impl)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    torch.testing.assert_close(*found)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_tiled_body_is_no_worse_than_the_reference_in_low_precision(name, dtype):
    """The reference makes float32 sums and rounds once; the tiled body may round a few times more."""
    case = CASES[name]
    tensors = case.tensors(dtype, grad=False)
    exact = case.call(*(t.double() for t in tensors), impl="reference")
    error = {impl: (case.call(*tensors, impl=impl).double() - exact).abs().max() for impl in ("tiled", "reference")}
    assert error["tiled"] <= 2 * error["reference"] + 4 * torch.finfo(dtype).eps * exact.abs().max()


@every_case
def test_inputs_may_be_strided_views(name):
    case = CASES[name]
    tensors = case.tensors(grad=False)
    views = [torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for t in tensors]
    for impl in ("reference", "tiled"):
        torch.testing.assert_close(case.call(*views, impl=impl), case.call(*tensors, impl=impl))


@every_case
def test_an_empty_batch_gives_an_empty_result(name):
    case = CASES[name]
    tensors = [t[:0] if batched else t for t, batched in zip(case.tensors(grad=False), case.batched, strict=True)]
    tensors = [t.clone().requires_grad_() for t in tensors]
    for impl in ("reference", "tiled"):
        out = case.call(*tensors, impl=impl)
        assert out.shape == (0, *case.call(*case.tensors(), impl=impl).shape[1:])
        assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [t.shape for t in tensors]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "scale" in OPS[case.name].defaults])
def test_the_scale_multiplies_the_logits(name):
    op, _, kwargs = CASES[name].op_call()
    kwargs |= dict.fromkeys({"rel_h", "rel_w"} & set(kwargs))  # the relative logits see q itself
    double = {"q": 2 * kwargs["q"]} if "q" in kwargs else {}
    double |= {"k": 2 * kwargs["k"]} if "agents" in kwargs else {}  # agents meet keys, and queries agents
    double |= {branch: [2 * kwargs[branch][0], *kwargs[branch][1:]] for branch in {"high", "low"} & set(kwargs)}
    for impl in ("reference", "tiled"):
        twice = op(**kwargs | {"scale": 0.6, "impl": impl})
        torch.testing.assert_close(twice, op(**kwargs | double | {"scale": 0.3, "impl": impl}))


@every_case
def test_a_body_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match=rf"{CASES[name].name}: impl must be one of .*'reference'\], got 'quick'"):
        CASES[name].call(*CASES[name].tensors(), impl="quick")


@every_case
def test_asking_for_fused_never_falls_back(name):
    tensors = CASES[name].tensors(torch.float32, grad=False)
    with pytest.raises(NotImplementedError, match=f"{CASES[name].name}: impl='fused' cannot run here: .+"):
        CASES[name].call(*tensors, impl="fused")


@every_case
def test_impl_may_be_the_enumeration(name):
    tensors = CASES[name].tensors(grad=False)
    torch.testing.assert_close(CASES[name].call(*tensors, impl=Impl.TILED), CASES[name].call(*tensors, impl="tiled"))


@every_case
def test_integers_are_refused(name):
    with pytest.raises(ValueError, match=r"must be floating point, got torch\.int64"):
        CASES[name].call(*CASES[name].tensors(torch.int64, grad=False))


@every_case
def test_macs_are_those_of_the_definition_whatever_the_body_does(name):
    case = CASES[name]
    assert OPS[case.name].macs is not None
    declared = OPS[case.name].useful_macs(**case.op_call()[2])
    counts = {count_macs(OneInput(case, impl), case.tensors(grad=False)[0]) for impl in ("reference", "tiled")}
    assert counts == {declared} and declared > 0


class OneInput(nn.Module):
    """The case as a function of its first tensor, as `count_macs` calls a model."""

    def __init__(self, case, impl):
        super().__init__()
        self.call, self.rest, self.impl = case.call, case.tensors(grad=False)[1:], impl

    def forward(self, x):
        return self.call(x, *self.rest, impl=self.impl)


def test_a_body_that_misses_an_argument_is_refused_when_the_op_is_declared():
    def double(x: torch.Tensor, factor: float = 2.0, *, impl: str = "auto") -> torch.Tensor:
        raise NotImplementedError

    def body(x):
        return 2 * x

    with pytest.raises(TypeError, match="body must take the arguments of double: factor, x"):
        declare(double, check=lambda x: None, reference=body, tiled=body, why_not_fused=lambda x: "none")
    assert "double" not in OPS
