"""Time the Python of a call of the fused ops, up to the launches' entry into the driver. No GPU is needed.

    git worktree add ../before COMMIT && mkdir ../with && ln -s ../before ../with/foveate
    python -m foveate.benchmarks.call_overhead --against ../with --out benchmarks/results/call_overhead.txt

Kernels are compiled for sm_90 and launched by a driver that does nothing, on the tensors of a CPU; compiling happens
before the clock starts. Microseconds of the fastest of 15 rounds, of this package and of another one in turns.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.table import Table

from ._timing import describe_machine, write_report

MODULE = "foveate.benchmarks.call_overhead"
SCRIPT = Path(__file__).with_name("_calls_of.py")
PACKAGE = MODULE.partition(".")[0]
TURNS = 2
Calls = dict[str, dict[str, float]]  # microseconds of each kind of call, by op


def measure(folder: Path | None) -> Calls:
    """Run the calls in a process of their own, with the package `foveate` of a folder, or with this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    if folder is not None:
        environment["PYTHONPATH"] = str(folder.resolve())
    done = subprocess.run([sys.executable, str(SCRIPT), PACKAGE], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{SCRIPT.name} failed with the package of {folder or 'this process'}:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def fewer(one: Calls, other: Calls) -> Calls:
    """The smaller time of each call."""
    return {op: {kind: min(us, other[op][kind]) for kind, us in kinds.items()} for op, kinds in one.items()}


def tabulate(now: Calls, before: Calls | None) -> Table:
    table = Table(title="microseconds of a call" + (", and of the same with the other package" if before else ""))
    table.add_column("op", no_wrap=True)
    for kind in next(iter(now.values())):
        table.add_column(kind, justify="right")
    for op, kinds in now.items():
        cells = [f"{us:.0f}" + (f" ({before[op][kind]:.0f})" if before else "") for kind, us in kinds.items()]
        table.add_row(op, *cells)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="DIR", help="folder that holds another package foveate")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    if options.against is not None and not (options.against / PACKAGE / "__init__.py").is_file():
        parser.error(f"--against: wanted a folder that holds the package foveate, got {options.against}")
    now, before = measure(None), None
    for turn in range(TURNS):
        if options.against is not None:
            taken = measure(options.against)
            before = taken if before is None else fewer(before, taken)
        if turn:
            now = fewer(now, measure(None))
    write_report(tabulate(now, before), module=MODULE, machine=describe_machine(), out=options.out)


if __name__ == "__main__":
    main()
