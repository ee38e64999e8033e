"""The roofline table counts logits, traffic and instructions as a loop over tiles does, without a compiler."""

import math
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from foveate.benchmarks import roofline
from foveate.benchmarks._layers import LAYERS, LocalLayer, RoutedLayer
from foveate.benchmarks._machine_code import Compiled
from foveate.benchmarks.roofline import GPUS, Row, main, table_of_code, table_of_times, work_of
from foveate.kernels.local.plan import Pattern, make_plan, one_pass_plan

HALO = LocalLayer("halo", Pattern("block", (4, 4), (1, 2)), (9, 14), 2, 16)
DILATED = LocalLayer("dilated", Pattern("neighborhood", (3, 5), dilation=(2, 1)), (9, 14), 2, 16, "rpb")
WINDOWS = LocalLayer("windows", Pattern("block", (3, 7)), (9, 14), 2, 16, "bias")


def code(layer, name="local_forward_kernel", batch=3, instructions=(100, 40), **more) -> Compiled:
    """A kernel of so many instructions, so many of them in its loop."""
    one_pass = name == "local_backward_kernel"
    plan: Any = one_pass_plan(layer.pattern, layer.size) if one_pass else plan_of(layer, "dkv" in name)
    tiles = math.prod(
        axis.tiles(-(-n // step))
        for axis, n, step in zip((plan.rows, plan.cols), layer.size, layer.pattern.dilation, strict=True)
    )
    programs = batch * layer.heads * tiles * math.prod(layer.pattern.dilation)
    constants = {"ROWS": plan.rows, "COLS": plan.cols} | more
    made = Compiled(name, 90, 4, 1024, "", b"", programs=5 if one_pass else programs, constants=constants)
    total, loop = instructions
    made.__dict__["instructions"] = [(16 * i, "FADD", "") for i in range(total - 1)] + [
        (16 * (total - 1), "BRA", f" 0x{16 * (total - loop):x}")
    ]
    made.__dict__["_usage"] = "REG:100 STACK:0"
    return made


def plan_of(layer, inverse=False):
    return make_plan(layer.pattern, layer.size, layer.size, 64, inverse=inverse, by_block=False)


@pytest.mark.parametrize("name", ["local_forward_kernel", "local_dq_kernel", "local_dkv_kernel"])
@pytest.mark.parametrize("layer", [HALO, DILATED, WINDOWS], ids=lambda layer: layer.name)
def test_logits_are_those_of_all_steps(layer, name):
    compiled = code(layer, name)
    rows, cols = compiled.constants["ROWS"], compiled.constants["COLS"]
    steps = 0
    for group_y in range(layer.pattern.dilation[0]):
        for group_x in range(layer.pattern.dilation[1]):
            height, width = (
                len(range(group, n, step))
                for group, n, step in zip((group_y, group_x), layer.size, layer.pattern.dilation, strict=True)
            )
            for tile_y in range(rows.tiles(height)):
                for tile_x in range(cols.tiles(width)):
                    if rows.owned(tile_y, height)[1] < rows.owned(tile_y, height)[2]:
                        low, high = rows.walked(tile_y, height, height)
                        empty = cols.owned(tile_x, width)[1] >= cols.owned(tile_x, width)[2]
                        steps += 0 if empty else -(-(high - low) // rows.walk_step) * rows.walk_split * cols.walks
    logits = 3 * layer.heads * steps * rows.tile * cols.tile * rows.walk * cols.walk
    work = work_of(layer, 3, compiled)
    assert work.logits == logits and math.isclose(work.turns * compiled.programs * plan_size(compiled), logits)


def plan_size(compiled) -> int:
    rows, cols = compiled.constants["ROWS"], compiled.constants["COLS"]
    return rows.tile * cols.tile * rows.walk * cols.walk


def test_the_one_pass_kernel_visits_each_tile_once_and_moves_eight_maps():
    work = work_of(WINDOWS, 3, code(WINDOWS, "local_backward_kernel", CELLS=0))
    assert work.logits == 3 * 2 * 6 * 32 * 32 and work.turns == 36 / 5  # tiles of 4x8 tokens hold a window of 3x7
    assert math.isclose(work.maps, 8 + 4 / 32)  # and lse, fp32 for 16 channels of 2 bytes


def test_a_pass_of_more_kernels_moves_more_than_its_floor():
    rows = [
        Row(DILATED, 3, c, work_of(DILATED, 3, c))
        for c in (code(DILATED, "local_dq_kernel"), code(DILATED, "local_dkv_kernel"))
    ]
    assert sum(row.work.maps for row in rows) > roofline.FLOOR_MAPS["backward"]
    assert all(row.passes == "backward" for row in rows)


def test_useful_logits_are_those_of_the_definition():
    assert HALO.useful() == 6 * 8 and DILATED.useful() == 15 and WINDOWS.useful() == 21
    circle = LocalLayer("circle", Pattern("circle", (2, 2), (1, 1)), (3, 4), 1, 16)
    assert math.isclose(
        circle.useful(), (12 + 2 * 8 + 2 * 9 + 4 * 6) / 12
    )  # itself, beside, above and below, diagonals
    assert RoutedLayer("routed", (8, 8), (2, 4), 1, 16, 3).useful() == 24


def test_executed_instructions_count_each_turn_of_the_loop():
    compiled = code(HALO, instructions=(100, 40))
    assert (compiled.executed(1), compiled.executed(2.5)) == (100, 160)
    assert compiled.blocks_of_sm == 4  # 65536 registers hold four blocks of 128 threads with 104 each


def test_more_programs_than_multiprocessors_share_them():
    row = Row(HALO, 3, code(HALO), work_of(HALO, 3, code(HALO)))
    fewer, more = (
        Row(HALO, 3, replace_programs(row.code, programs), row.work).times_us()[2]
        for programs in (GPUS[90].multiprocessors, GPUS[90].multiprocessors + 1)
    )
    assert math.isclose(more, 2 * fewer)


def replace_programs(compiled, programs):
    made = replace(compiled, programs=programs)
    made.__dict__.update({name: compiled.__dict__[name] for name in ("instructions", "_usage")})
    return made


def test_the_tables_name_each_kernel_and_the_pass():
    kernels = [code(DILATED), code(DILATED, "local_dq_kernel"), code(DILATED, "local_dkv_kernel")]
    rows = [Row(DILATED, 3, c, work_of(DILATED, 3, c), 7.0 if "dq" in c.name else 5.0) for c in kernels]
    for table in (table_of_code(rows, "code"), table_of_times(rows, "times")):
        assert table.row_count == 4
        column = next(c for c in table.columns if c.header == "kernel")
        assert list(column.cells)[-1] == "backward, all"
    measured = table_of_times(rows, "times").columns[-1]
    assert list(measured.cells) == ["5.0", "7.0", "5.0", "12.0"]


def test_layers_run_on_models_shapes():
    assert {layer.name.split("-")[0].split()[0] for layer in LAYERS} >= {
        "NAT", "DiNAT", "DaViT", "Swin", "LITv2", "HaloNet", "CLEAR", "BiFormer",
    }  # fmt: skip
    assert len({layer.name for layer in LAYERS}) == len(LAYERS)


@pytest.mark.parametrize("arguments", [["--only", "no such layer"], ["--batch", "0"]])
def test_a_request_for_nothing_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "no layer" in capsys.readouterr().err


def test_a_gpu_times_every_launch_again(monkeypatch):
    launches = [(code(HALO), lambda: "again")]

    class Recorded:
        def __enter__(self):
            return launches

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(roofline, "launches_on_gpu", Recorded)
    monkeypatch.setattr(LocalLayer, "run", lambda self, batch, device: None)
    timed = []
    (row,) = roofline.measured_rows_of(HALO, 3, lambda launch: timed.append(launch()) or 4.5)
    assert timed == ["again"] and row.measured_us == 4.5
