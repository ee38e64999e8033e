"""The official code's outputs through the kernels: the ops' own golden tests, in Triton's interpreter."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gates import by_op

OPS = Path(__file__).parents[2] / "attention_ops"


def op_tests(op):
    spec = importlib.util.spec_from_file_location(f"golden_tests_of_{op}", OPS / f"test_{op}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_neighborhood_attention_sees_the_keys_that_natten_sees(golden):
    op_tests("neighborhood").check_the_official_masks(golden, "fused")


def test_channel_attention_equals_the_official_code(det, golden, relative_error):
    op_tests("channel").test_the_layer_equals_the_official_ones(det, golden, relative_error)


def test_the_channel_gate_equals_the_official_code(det, golden, relative_error):
    op_tests("channel_gate").check_the_official_layers(det, golden, relative_error, by_op)


def test_large_kernel_attention_equals_the_official_code(det, golden, relative_error):
    op_tests("large_kernel").check_the_official_layer(det, golden, relative_error, by_op)


def check(layer, case, out_of, expected, det, relative_error):
    x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"])).requires_grad_()
    out = out_of(layer, x)
    assert relative_error(out, expected) < 1e-5
    (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
    gradient = np.array(case["grad_in"]["samples"], dtype=np.float32)
    assert relative_error(x.grad.contiguous(), gradient, gradient.size) < 1e-4


AGENTS = ["deit_32_h2_a25_9", "pvt_32_h2_a9_16_sr2", "dense_32_h2_a16_trained14_20x9_agents5x3"]


def test_agent_attention_equals_the_official_code(det, golden, relative_error):
    assert op_tests("agent").check_the_official_layers(golden, det, relative_error, AGENTS)


SLOW = ["bra_7", "bra_14_top16", "bra_pad_15x20", "bra_qkdim32", "bra_soft_diff", "bra_kv_avg2", "nchw_13x10"]
CASES = ["bra_h4_nwin4_16x8", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", CASES)
def test_routed_attention_equals_the_official_code(det, golden, relative_error, name):
    cases, arrays = golden("module__biformer")
    layer = op_tests("bi_level_routing").official_layer(cases[name], det)
    check(layer, cases[name], lambda layer, x: layer(x), arrays[f"{name}__out"], det, relative_error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hilo_6x10_b2", "hilo_dense_13x15_a0.5"])
def test_hilo_attention_equals_the_official_code(det, golden, relative_error, name):
    cases, arrays = golden("module__litv2")
    c = cases[name]["ctor"]
    layer = op_tests("hilo").HiLoAttention(
        c["dim"], c["num_heads"], c["window_size"], c["alpha"], qkv_bias=c["qkv_bias"]
    )
    layer.load_state_dict(det.det_state_dict(cases[name]["state_dict"]))
    size = [int(n) for n in re.search(r"H=(\d+), W=(\d+)", cases[name]["layout"]).groups()]

    def forward(layer, x):
        return layer(x.unflatten(1, size)).flatten(1, 2)

    check(layer, cases[name], forward, arrays[f"{name}__out"], det, relative_error)
