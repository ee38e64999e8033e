"""Public functions of ops: what they pass on, and what they refuse."""

import inspect

import pytest
import torch

from foveate import attention_ops
from foveate.attention_ops import circle_attention_lse
from foveate.attention_ops._op import OPS


@pytest.mark.parametrize("name", OPS)
def test_public_functions_pass_all_arguments_in_the_order_of_their_signatures(monkeypatch, name):
    function = getattr(attention_ops, name)
    given = {parameter: object() for parameter in inspect.signature(function).parameters}
    namespace = inspect.unwrap(function).__globals__
    monkeypatch.setitem(namespace, "run", lambda op, *values: (op, values))
    assert function(**given) == (name, tuple(given.values()))


def test_calls_that_do_not_fit_a_signature_are_type_errors():
    q = torch.zeros(1, 3, 3, 1, 4)
    for args, kwargs in (((q, q), {}), ((q, q, q, 2), {"q": q}), ((q, q, q, 2), {"radios": 2}), ((q,) * 20, {})):
        with pytest.raises(TypeError):
            circle_attention_lse(*args, **kwargs)
    out, lse = circle_attention_lse(q, q, v=q, radius=2)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
