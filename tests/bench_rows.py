"""Rows of `foveate bench` that were not measured."""

from foveate.benchmarks.bench import Cell, Row


def row(model="van_b0", engine="eager", px=224, batch=8, seconds=(0.5,), **kwargs) -> Row:
    return Row(Cell(model, engine, "float32", batch, px), macs=10**9, seconds=list(seconds), **kwargs)
