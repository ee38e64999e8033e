"""The interpreter itself, with the remedies of conftest.py: without them the other suites would prove little."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr):
    row, col = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    a, b = tl.load(a_ptr + row * SIDE + col), tl.load(b_ptr + row * SIDE + col)
    tl.store(out_ptr + row * SIDE + col, tl.dot(a, b).to(out_ptr.dtype.element_ty))


def test_bfloat16_products_and_rounding_are_those_of_torch():
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16, dtype=torch.bfloat16)
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](a, b, out, SIDE=16)
    torch.testing.assert_close(out, (a.float() @ b.float()).bfloat16(), rtol=0, atol=0)


@triton.jit
def copy_kernel(from_ptr, to_ptr, count, SIZE: tl.constexpr):
    here = tl.arange(0, SIZE)
    tl.store(to_ptr + here, tl.load(from_ptr + here, mask=here < count, other=0.0), mask=here < count)


@pytest.mark.parametrize("sizes", [(7, 8), (8, 7)], ids=["read", "write"])
def test_memory_of_no_tensor_is_neither_read_nor_written(sizes):
    source, target = (torch.ones(size) for size in sizes)
    copy_kernel[(1,)](source, target, 7, SIZE=8)
    assert target[:7].tolist() == [1.0] * 7
    with pytest.raises(Exception, match="outside the tensors"):
        copy_kernel[(1,)](source, target, 8, SIZE=8)


def test_fresh_memory_is_nan():
    assert torch.empty(1000).isnan().all()
