"""Tables that pages ask for in comments: models and recipes of a family, costs of ops, measurements, recipes."""

import inspect
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from model_rows import TITLES, model_rows

import foveate
from foveate import attention_ops
from foveate.attention_ops._op import OPS, Impl
from foveate.train.catalog import Entry, catalog

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FACTS = ("Command", "Date", "CPU", "GPU", "Versions", "Compiler", "Features")


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def models(patterns: str) -> str:
    """Return the models whose names match shell patterns, which spaces separate.

    Raises:
        ValueError: a pattern matches no model.
    """
    names = []
    for pattern in patterns.split():
        found = [name for name in foveate.list_models() if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"models: no model matches {pattern!r}")
        names += [name for name in found if name not in names]
    return markdown(TITLES, (row for name in names for row in model_rows(name)))


def recipes(patterns: str) -> str:
    """Return the recipes whose names match shell patterns.

    Raises:
        ValueError: a pattern matches no recipe.
    """
    entries = catalog()
    found: list[Entry] = []
    for pattern in patterns.split():
        matching = [entry for entry in entries if fnmatchcase(entry.name, pattern)]
        if not matching:
            raise ValueError(f"recipes: no recipe matches {pattern!r}")
        found += [entry for entry in matching if entry not in found]
    titles = ("recipe", "model", "epochs", "global batch", "cost, EMACs", "published, %", "ours, %")
    return markdown(titles, map(_recipe_row, found))


def _recipe_row(entry: Entry) -> tuple[str, ...]:
    numbers = (str(entry.epochs), str(entry.global_batch), f"{entry.emacs:.2g}")
    return f"`{entry.name}`", f"`{entry.model}`", *numbers, entry.published or "-", entry.ours or "-"


def costs() -> str:
    """Return every op with the cost that its docstring states, and whether it has a kernel."""
    rows = []
    for name in attention_ops.__all__:
        if name in OPS and (cost := stated_cost(getattr(attention_ops, name))):
            kernel = "yes" if Impl.FUSED in OPS[name].bodies else "none"
            rows.append((f"[`{name}`](reference/attention_ops.md#foveate.attention_ops.{name})", cost, kernel))
    return markdown(("op", "cost of the definition", "kernel"), rows)


def stated_cost(op: object) -> str:
    """Return the first sentence of the paragraph of a docstring that begins with "Cost:", or nothing."""
    found = re.search(r"^Cost(?: per head)?: (.+?)(?:\n\n|\Z)", inspect.getdoc(op) or "", re.DOTALL | re.MULTILINE)
    if not found:
        return ""
    text = " ".join(found[1].split())
    first = re.split(r"(?<=[a-z0-9)])\. |; ", text)[0].rstrip(".")
    return first.replace("*", r"\*").replace("|", r"\|")


def results() -> str:
    """Return the page of all measurements: machine and command, then every file as it is."""
    files = sorted(RESULTS.glob("*.txt"))
    table = markdown(("file", "machine", "date", "command"), map(_result_row, files))
    texts = (f"## {path.name}\n\n```text\n{path.read_text(encoding='utf-8').rstrip()}\n```" for path in files)
    head = "# Measurements: all files\n\nEvery file names its machine, its command and the versions."
    return "\n\n".join([head, table, *texts]) + "\n"


def result_facts(path: Path) -> dict[str, str]:
    """Return the lines of a file of measurements that say where and how it was measured."""
    lines = path.read_text(encoding="utf-8").splitlines()[:10]
    pairs = (line.partition(" ") for line in lines)
    return {word: rest.strip() for word, _, rest in pairs if word in FACTS}


def _result_row(path: Path) -> tuple[str, ...]:
    facts = result_facts(path)
    anchor = re.sub(r"[^\w-]", "", path.name)
    command = f"`{facts['Command']}`" if "Command" in facts else "in the file"
    machine = facts.get("GPU", facts.get("CPU", "in the file"))
    return f"[{path.name}](#{anchor})", machine, facts.get("Date", "-"), command
