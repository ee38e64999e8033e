"""Ops that also return the log-sum-exp of the logits: their public functions, from those of the plain ops."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from torch import Tensor

from ._op import Body, run

P = ParamSpec("P")
LSE_DOC = """Run `{0}`, and return the log-sum-exp of the logits too, for `merge_attention`.

    Both results are differentiable. The tiled body is slower than that of `{0}`: SDPA in torch returns no log-sum-exp.

    Args:
        The arguments of `{0}`.

    Returns:
        The output of `{0}`, and the natural logarithm of the sum of exp(logit) over the keys that a query sees, with
        all that is added to the scaled logits: (B, H, W, heads) as q, float32, or float64 for float64.

    Raises:
        ValueError, NotImplementedError: in the cases of `{0}`.
    """


def lse_variant(promise: Callable[P, Tensor]) -> Callable[P, tuple[Tensor, Tensor]]:
    """Return the public function `NAME_lse`: the arguments of `promise`, and one more result."""
    name, signature = f"{promise.__name__}_lse", inspect.signature(promise)
    parameters = signature.parameters.values()
    names = tuple(signature.parameters)
    positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def call(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, args, strict=False))
        arguments = {**defaults, **given, **kwargs}
        if (
            len(args) > positional
            or len(given) + len(kwargs) > len({**given, **kwargs})
            or len(arguments) != len(names)
        ):
            signature.bind(*args, **kwargs)  # raises TypeError
        return run(name, *(arguments[key] for key in names))

    results = tuple[Tensor, Tensor]
    vars(call)["__signature__"] = signature.replace(return_annotation=results)
    call.__annotations__ = promise.__annotations__ | {"return": results}
    call.__name__ = call.__qualname__ = name
    call.__module__, call.__doc__ = promise.__module__, LSE_DOC.format(promise.__name__)
    return call


def first_result(body: Body) -> Body:
    """Return a body that computes what `body` does, and returns the first of its results."""

    @wraps(body)
    def run(*args: Any) -> Tensor:
        return body(*args)[0]

    return run
