"""A first run on a GPU, under 8 minutes: are the kernels right, how fast, which tiles are best, what do models gain.

    python -m foveate.benchmarks.gpu_first_hour                      # all parts
    python -m foveate.benchmarks.gpu_first_hour --parts a            # one part
    python -m foveate.benchmarks.gpu_first_hour --cpu                # a dry run in Triton's interpreter, small maps

Parts      a: correctness, b: timings beside peers, c: tile sweep, d: training steps, e: torch's machinery.
Errors     Every case is apart: an error is printed and counted, and the run goes on.
Times      "gpu": a replayed CUDA graph with a cold L2 cache, without launch costs; "eager": plain calls in a row.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

MODULE = "foveate.benchmarks.gpu_first_hour"
PARTS = "aebcd"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(MODULE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=PARTS, help="letters of the parts, in any order (default %(default)s)")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for all parts (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images (default %(default)s)")
    parser.add_argument("--only", default="", help="cases of part a whose name holds this word")
    parser.add_argument("--cpu", action="store_true", help="run small cases in Triton's interpreter")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts takes letters of {PARTS}, got {''.join(sorted(unknown))}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; return 1 where a case of part a is bad."""
    options = parse(arguments)
    if options.cpu and os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it once, and is imported by now
        command = [sys.executable, "-m", MODULE, *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"})
    import torch

    if options.worker:
        from .precompile import work

        return work(options.worker, options.batch)
    if not options.cpu and not torch.cuda.is_available():
        print(f"{MODULE}: no CUDA GPU here; --cpu runs small cases in Triton's interpreter", file=sys.stderr)
        return 2
    from .session import Session

    session = Session(
        "cpu" if options.cpu else "cuda", options.batch, options.budget, not options.no_compile, options.only
    )
    run(session, options.parts)
    if options.out:
        options.out.write_text(json.dumps(session.results, default=str, indent=1))
    return int(any(row["bad"] for row in session.results.get("a", ())))


def run(session, parts: str) -> None:
    import torch
    import triton

    from .clock import Clock
    from .correctness import correctness
    from .machinery import machinery
    from .precompile import WAIT_SECONDS, start_workers, wait_for
    from .session import first_line, say
    from .sweep import sweep
    from .timings import timings
    from .training import training_steps

    machine = torch.cuda.get_device_name() if session.gpu else "Triton's interpreter"
    say(f"torch {torch.__version__}, triton {triton.__version__}, {machine}")
    session.results |= {"torch": torch.__version__, "triton": triton.__version__, "machine": machine}
    if session.gpu and set("ac") & set(parts):
        wait_for(start_workers(MODULE, session.batch), WAIT_SECONDS)
    clock = Clock(session)
    steps = {
        "a": lambda: correctness(session),
        "e": lambda: machinery(session),
        "b": lambda: timings(session, clock),
        "c": lambda: sweep(session, clock),
        "d": lambda: training_steps(session),
    }
    for part, step in steps.items():
        if part not in parts or session.left() <= 10:
            continue
        start = time.perf_counter()
        try:
            step()
        except Exception as error:
            say(f"part {part}: RAISED {first_line(error)}")
            traceback.print_exc(limit=-3)
        say(f"   [part {part}: {time.perf_counter() - start:.0f} s, {session.left():.0f} s left]")


if __name__ == "__main__":
    sys.exit(main())
