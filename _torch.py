"""The private names of torch that this package needs, in one place: what a new torch release can move.

oneDNN's operators are in attention_ops/_onednn.py, which tries each of them before it is used.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
import torch.fx.experimental._config
import torch.jit._builtins
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.library import CustomOpDef
from torch.nn.attention import SDPBackend
from torch.utils import _pytree as pytree

__all__ = [
    "OpOverload",
    "assume",
    "assumptions",
    "backward_number",
    "body_of",
    "calls_are_seen",
    "compile_package",
    "compiled_graphs",
    "compiles",
    "dispatch_modes_are_on",
    "forward_ad_is_on",
    "has_bfloat16_products",
    "has_vnni",
    "is_faked_or_recorded",
    "load_package",
    "name_of",
    "next_number",
    "prefers_flash_attention",
    "pytree",
    "script_as",
    "takes_sizes_of_one",
    "taking_sizes_of_one",
    "transforms_are_on",
    "without_compiler_caches",
]


assume = torch._check  # that a condition on free sizes holds


def transforms_are_on() -> bool:
    """Say whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def next_number() -> int:
    """Return the number that autograd gives to the next operation of this thread."""
    return torch._C._autograd._get_sequence_nr()


def backward_number() -> int | None:
    """Return the number of the operation whose gradient this thread computes; None outside a backward pass."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def forward_ad_is_on() -> bool:
    """Say whether this is inside `forward_ad.dual_level()`."""
    return forward_ad._current_level >= 0


def dispatch_modes_are_on() -> bool:
    """Say whether a TorchDispatchMode sees the operations of this thread: a tracer, FakeTensorMode, a user's own."""
    return torch._C._len_torch_dispatch_stack() > 0


def calls_are_seen() -> bool:
    """Say whether a profiler or a TorchFunctionMode sees the operators that this thread calls."""
    return torch._C._is_torch_function_mode_enabled() or torch._C._autograd._profiler_enabled()


def body_of(op: CustomOpDef) -> Callable[..., Any]:
    """Return the function that a custom op was made of."""
    return op._init_fn


def takes_sizes_of_one() -> bool:
    """Say whether the exporter at work lets free sizes be 1 without a case of their own."""
    return torch.fx.experimental._config.backed_size_oblivious


def taking_sizes_of_one() -> AbstractContextManager[None]:
    """Let the exporter leave sizes free that may be 1."""
    return torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]  # made at run time


def assumptions(program: torch.export.ExportedProgram) -> list[str]:
    """Return what torch.export assumed about free sizes, as Python expressions of the inputs by name.

    torch 2.8 refuses what it cannot prove, and keeps no list.
    """
    return list(getattr(program, "_guards_code", ()))


def script_as(function: Callable[..., Any], op: str) -> None:
    """Let torch.jit.script compile calls of a Python function as calls of an op, `namespace::name`."""
    torch.jit._builtins._register_builtin(function, op)


def name_of(op: CustomOpDef) -> str:
    """Return the name of a custom op, with its namespace."""
    return op._qualname


def is_faked_or_recorded() -> bool:
    """Say whether FakeTensorMode or a tracer of operations is at work."""
    if not dispatch_modes_are_on():
        return False
    modes = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)


def prefers_flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> bool:
    """Say whether SDPA would take its flash kernel for these tensors."""
    return torch._fused_sdp_choice(q, k, v, scale=scale) == SDPBackend.FLASH_ATTENTION.value


def compiles() -> bool:
    """Say whether torch.compile, not an exporter, traces operations in this thread."""
    return TracingContext.try_get() is not None and not torch.compiler.is_exporting()


def has_bfloat16_products() -> bool:
    """Say whether this CPU multiplies bfloat16 itself (AVX-512 BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_vnni() -> bool:
    """Say whether this CPU adds products of int8 numbers in 32 bits (VNNI)."""
    return torch.cpu._is_vnni_supported()


def without_compiler_caches() -> AbstractContextManager[None]:
    """Let torch.compile read and write no file of graphs that were compiled before."""
    from torch._inductor import config  # imported here: it takes a second

    return config.patch(force_disable_caches=True)


def compile_package(
    program: torch.export.ExportedProgram, path: str, options: dict[str, Any], *, packed: bool = False
) -> None:
    """Compile a program with AOTInductor and write its package, without the generated sources.

    torch's writer aborts the process on a full disk: the package goes through memory.

    Args:
        packed: weights are packed for oneDNN's products, instead of at each call. What a program computes from tables
            or makes of numbers, such as the bias of each pair of tokens, is computed when the package is first called.
    """
    from torch._inductor import config

    package = BytesIO()
    if hasattr(config.aot_inductor, "enable_line_tables"):  # a third of the code; older versions of torch add none
        options = options | {"aot_inductor.enable_line_tables": False}
    with _packing_weights() if packed else nullcontext({}) as packing:
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options | packing)
    out = BytesIO()
    with ZipFile(package) as whole, ZipFile(out, "w") as kept:
        for entry in whole.infolist():
            # torch 2.11 looks for metadata by the name of a source
            kept.writestr(entry, b"" if entry.filename.endswith(".cpp") else whole.read(entry))
    Path(path).write_bytes(out.getbuffer())


@contextmanager
def _packing_weights() -> Iterator[dict[str, Any]]:
    """Yield options with which constants are folded: weights at once, what is larger than its source at the first call.

    torch has one list of operations that it does not fold, for both.
    """
    from torch._inductor import constant_folding

    unfolded, aten = constant_folding._dont_constant_fold, torch.ops.aten
    before = tuple(unfolded)
    gathers = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.gather.default, aten.index_select.default)
    masks = (torch.ops.prims.iota.default, aten.bitwise_and.Tensor, aten.logical_and.default)
    resized = (aten.mm.default, aten.bmm.default, aten.add.Tensor)  # position tables, and sums of rows and columns
    unfolded += [*gathers, aten.embedding.default, *masks, *resized]
    if torch.backends.mkldnn.is_available():
        unfolded.append(torch.ops.mkldnn._linear_pointwise.default)  # what `mm` has become by then

    def fold_all(graph: torch.fx.Graph) -> None:  # called between the two
        unfolded[:] = before

    try:
        yield {
            "freezing": True,
            "aot_inductor.use_runtime_constant_folding": True,
            "post_grad_custom_post_pass": fold_all,
        }
    finally:
        unfolded[:] = before


def load_package(path: str) -> Any:
    """Load an AOTInductor package: it is called with the inputs, and `get_metadata()` is a dict of texts."""
    return torch._inductor.aoti_load_package(path)


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has captured in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
