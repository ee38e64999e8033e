"""The traffic of exact attention: recorded counts, and the column of the roofline table."""

import math

import pytest

from foveate.benchmarks._attention_io import (
    io_bound,
    key_outer_traffic,
    least_traffic,
    query_outer_traffic,
    unfused_traffic,
)


def test_bounds_and_tilings_equal_the_recorded_counts(golden):
    facts, _ = golden("module__attention_io")
    assert len(facts["rows"]) == 50
    for row in facts["rows"]:
        tokens, dim, cache = row["N"], row["d"], row["M"]
        assert math.isclose(io_bound(tokens, tokens, dim, cache), row["bound_without_constant"], abs_tol=1e-3)
        assert least_traffic(tokens, tokens, dim) == row["read_inputs_write_output"]
        assert key_outer_traffic(tokens, dim, cache) == row["flash_1_words"]
        assert query_outer_traffic(tokens, dim, cache) == row["flash_2_words"]
        assert unfused_traffic(tokens, dim) == row["standard_words"]


def test_the_regimes_meet_at_a_cache_of_the_squared_width():
    assert math.isclose(io_bound(100, 100, 32, 32**2), 100 * 100)
    assert io_bound(100, 100, 32, 500) < 100 * 100 * 32**2 / 500
    assert io_bound(100, 100, 32, 5000) < 100 * 100 * 32 / math.sqrt(5000)


def test_tiles_are_counted_as_a_loop_reads_them():
    tokens, dim, tile = 10, 3, 4
    cache, words = 4 * dim * tile, 0
    for start in range(0, tokens, tile):
        queries = min(tile, tokens - start)
        words += queries * dim + 2 * tokens * dim + queries * dim + queries  # q, all k and v, out, log-sum-exp
    assert query_outer_traffic(tokens, dim, cache) == words


def test_the_roofline_table_shows_the_bound():
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from foveate.benchmarks import roofline
    from foveate.benchmarks._layers import LocalLayer
    from foveate.benchmarks._machine_code import Compiled
    from foveate.kernels.local.plan import Pattern

    layer = LocalLayer("windows", Pattern("block", (7, 7)), (14, 14), 2, 32)
    work = roofline.Work(1.0, 1.0, 4.0, 1.0, "")
    rows = [
        roofline.Row(layer, 3, Compiled(name, 90, 4, 0, "", b"", programs=1, constants={}), work)
        for name in ("local_forward_kernel", "local_backward_kernel")
    ]
    gpu = roofline.GPUS[90]
    cache = gpu.shared_bytes // 2
    expected = 3 * 2 * 4 * io_bound(49, 49, 32, cache) * 2 / gpu.hbm_bytes * 1e6  # images, heads, windows
    assert math.isclose(roofline.bound_us(rows[0]), expected) and roofline.bound_us(rows[1]) is None
