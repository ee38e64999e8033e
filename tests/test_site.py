"""The site: every model, recipe and public name has a place; figures and tables show what the package computes."""

import importlib
import inspect
import json
import re
import subprocess
import sys
import zlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import figures
import gate_figures
import interval_figures
import links
import model_rows as rows
import page_tables as tables
import pattern_figures
import pytest
import torch
import yaml
from content import REQUEST, fill
from pages import DOCS, ROOT
from panels import Panel, draw
from torch import nn

import foveate
from foveate import attention_ops
from foveate.attention_ops._op import OPS
from foveate.attention_ops.neighborhood import axis_window
from foveate.train.catalog import catalog

MODULES = ("", ".attention_ops", ".analysis", ".export", ".fusion", ".pruning", ".train")
PUBLIC = [
    (f"foveate{module}", name) for module in MODULES for name in importlib.import_module(f"foveate{module}").__all__
]
FAMILIES = sorted(path for path in (DOCS / "families").glob("*.md") if path.name != "index.md")
TORCHS = ("forward", "extra_repr", "reset_parameters")  # methods whose meaning is torch's
CONFIG = ROOT / "mkdocs.yml"


def requests(kind: str) -> dict[str, list[str]]:
    """What pages ask for, by page: patterns of models or recipes, or names of figures."""
    found: dict[str, list[str]] = {}
    for page in DOCS.rglob("*.md"):
        for match in REQUEST.finditer(page.read_text(encoding="utf-8")):
            if match[1] == kind:
                words = match[2].split() if kind != "figure" else [match[2].partition(" ")[0]]
                found.setdefault(page.relative_to(DOCS).as_posix(), []).extend(words)
    return found


def navigation(entry: Any) -> set[str]:
    if isinstance(entry, str):
        return {entry}
    parts = entry.values() if isinstance(entry, dict) else entry
    return set().union(*map(navigation, parts))


# Public names


@pytest.mark.parametrize(("module", "name"), [pytest.param(*pair, id=".".join(pair)) for pair in PUBLIC])
def test_a_public_name_has_a_docstring(module, name):
    thing = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(thing) or callable(thing) or inspect.ismodule(thing)):
        return  # a constant: the page shows the text behind its assignment
    assert not (inspect.getdoc(thing) or f"{name}(").startswith(f"{name}("), "no docstring, or a dataclass's own"
    if inspect.isclass(thing):
        own = {key: getattr(value, "__func__", value) for key, value in vars(thing).items() if key[0] != "_"}
        methods = {key: getattr(value, "fget", value) for key, value in own.items() if key not in TORCHS}
        assert [key for key, value in methods.items() if inspect.isfunction(value) and not value.__doc__] == []


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (foveate[\w.]*)$", text, re.MULTILINE))
    top = {f"foveate.{name}" for name in foveate.__all__} | {"foveate.fusion." + name for name in foveate.__all__}
    wanted = {f"{module}.{name}" for module, name in PUBLIC} - (top - shown) - {"foveate.__version__"}
    assert wanted - shown == set()
    assert {name for name in foveate.__all__ if f"foveate.{name}" not in shown} == {"__version__"}
    assert "foveate.__version__" in text


def test_constants_are_documented_where_they_are_assigned():
    for module, name in (("pruning.criteria", "CRITERIA"), ("pruning.groups", "GROUPS")):
        source = inspect.getsource(importlib.import_module(f"foveate.{module}"))
        assert re.search(rf'^{name}\b.*?^(?:\}}\n)?"""', source, re.DOTALL | re.MULTILINE)


# Pages


def test_every_page_is_in_the_navigation():
    listed = navigation(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["nav"])
    generated = {page for source, page in links.PAGES.items() if source != "README.md"} | {"results.md"}
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert listed == pages | generated


def test_every_model_is_on_the_page_of_one_family():
    asked = requests("models")
    pages = {
        name: [page for page, patterns in asked.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
        for name in foveate.list_models()
    }
    assert {name: found for name, found in pages.items() if len(found) != 1} == {}


def test_every_recipe_of_our_models_is_on_a_page():
    patterns = [pattern for patterns in requests("recipes").values() for pattern in patterns]
    ours = [entry.name for entry in catalog() if entry.model in (*foveate.list_models(), "dcal")]
    assert len(ours) > 80
    assert [name for name in ours if not any(fnmatchcase(name, pattern) for pattern in patterns)] == []


def test_every_figure_is_shown():
    assert {name for names in requests("figure").values() for name in names} == set(figures.FIGURES)


@pytest.mark.parametrize("page", FAMILIES, ids=lambda page: page.stem)
def test_the_page_of_a_family_is_complete(page):
    text, name = page.read_text(encoding="utf-8"), page.relative_to(DOCS).as_posix()
    assert "https://arxiv.org/abs/" in text and "```python" in text and len(requests("figure")[name]) == 1
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Equations", "Variants", "Use", "Differences from other implementations", "Recipes"]
    assert f"({page.name})" in (DOCS / "families/index.md").read_text(encoding="utf-8")


def test_what_concerns_one_family_is_on_its_page():
    headings = re.findall(r"^## (.+)$", (DOCS / "models.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == ["Create a model", "Behavior of all models", "What heads do"]


# Generated content


def test_a_request_is_replaced():
    asked = ("figure: nat Keys.", "models: van_b0", "recipes: van_micro*")
    text = fill("\n\n".join(f"<!-- {request} -->" for request in asked), "families/a.md")
    assert "![Keys.](../figures/nat.svg)" in text and "<!--" not in text
    assert "| `van_b0.in1k` | 224 | 4.1 M | 0.86 | 75.4 | apache-2.0 | [" in text
    assert "| `van_micro_1xb64_mnist5k` | `van_b0` |" in text


@pytest.mark.parametrize("request_", ["figure: not Text.", "models: not_*", "recipes: not_*", "models: van_b0 not"])
def test_a_request_for_nothing_is_refused(request_):
    with pytest.raises(ValueError, match="not"):
        fill(f"<!-- {request_} -->", "a.md")


@pytest.mark.parametrize(
    ("link", "source", "page", "to"),
    [
        ("../CONTRIBUTING.md#rules", "docs/families/van.md", "families/van.md", "../CONTRIBUTING.md#rules"),
        ("../../CONTRIBUTING.md#rules", "docs/families/van.md", "families/van.md", "../contributing.md#rules"),
        ("docs/ops.md", "CONTRIBUTING.md", "contributing.md", "ops.md"),
        ("../benchmarks/results", "docs/status.md", "status.md", "results.md"),
        ("../benchmarks/results/roofline.txt", "docs/a.md", "a.md", "results.md#rooflinetxt"),
        ("van.md#use", "docs/families/nat.md", "families/nat.md", "van.md#use"),
        ("https://arxiv.org/abs/2202.09741", "docs/a.md", "a.md", "https://arxiv.org/abs/2202.09741"),
    ],
)
def test_links_between_files_become_links_between_pages(link, source, page, to):
    assert links.to_site(f"[text]({link})", source, page) == f"[text]({to})"


def test_every_set_of_weights_has_a_row():
    for name in foveate.list_models():
        for cells in rows.model_rows(name):
            assert len(cells) == len(rows.TITLES) and cells[0].startswith(f"`{name}") and all(cells)
            assert re.fullmatch(r"[\d.]+ M", cells[2]) and float(cells[3]) > 0
    assert [cells[1:5] for cells in rows.model_rows("litv2_base")] == [
        ("224", "86.5 M", "12.9", "83.6"),
        ("384", "86.5 M", "38.7", "84.7"),
    ]
    assert rows.model_rows("van_b0")[0][6].startswith("[download](https://")
    assert rows.model_rows("biformer_tiny")[0][6] == "file only"


def test_the_cost_of_every_op_is_stated():
    public = {name for name in attention_ops.__all__ if name in OPS and not name.endswith("_lse")}
    shown = set(re.findall(r"\[`(\w+)`\]", tables.costs()))
    assert public - {"bi_level_routes", "merge_attention"} == shown


def test_all_measurements_are_on_one_page():
    page, files = tables.results(), sorted(tables.RESULTS.glob("*.txt"))
    assert re.findall(r"^## (\S+)$", page, re.MULTILINE) == [path.name for path in files]
    stated = [tables.result_facts(path) for path in files]
    assert sum("Command" in facts and "CPU" in facts for facts in stated) >= len(files) - 1


# Figures: what they show is what the ops compute


@pytest.fixture(scope="module")
def panels() -> dict[str, list[Panel]]:
    return {name: make() for name, make in figures.FIGURES.items()}


def test_figures_hold_finite_numbers_with_a_pattern(panels):
    for name, drawn in panels.items():
        for panel in drawn:
            assert panel.values.dim() == 2 and panel.values.isfinite().all(), name
            uniform = panel.title in ("all tokens, no bias",)
            assert (panel.values.max() > panel.values.min()) != uniform, (name, panel.title)


def test_weights_of_a_query_sum_to_one(panels):
    whole = ("nat", "biformer", "litv2", "agent-attention", "mixer-vit", "clear", "kernelized")
    for name in whole:
        for panel in panels[name]:
            torch.testing.assert_close(panel.values.sum(), torch.tensor(1.0), msg=f"{name}: {panel.title}")


@pytest.mark.parametrize("query", [(5, 8), (0, 1), (11, 15)])
@pytest.mark.parametrize(("kernel", "dilation"), [(7, 1), (4, 1), (3, 3)])
def test_the_neighborhood_that_is_drawn_is_that_of_the_definition(query, kernel, dilation):
    drawn = pattern_figures.neighborhood_weights(query, kernel, dilation=dilation)
    wanted = torch.zeros(pattern_figures.SIZE)
    sides = []
    for place, length in zip(query, pattern_figures.SIZE, strict=True):
        group = range(place % dilation, length, dilation)
        start = min(max(place // dilation - kernel // 2, 0), len(group) - kernel)
        sides.append(list(group)[start : start + kernel])
    for row in sides[0]:
        for column in sides[1]:
            wanted[row, column] = 1 / kernel**2
    torch.testing.assert_close(drawn, wanted)


def test_windows_and_halos_that_are_drawn_are_those_of_the_definition():
    window = torch.zeros(pattern_figures.SIZE)
    window[4:8, 8:12] = 1 / 16
    torch.testing.assert_close(pattern_figures.window_weights((5, 8), 4), window)
    halo = torch.zeros(pattern_figures.SIZE)
    halo[0:6, 0:6] = 1 / 64  # 8 x 8 keys, of which zeros outside the map take their part
    torch.testing.assert_close(pattern_figures.halo_weights((0, 1), 4, 2), halo)


def test_the_field_of_the_large_kernel_is_23_tokens_wide(panels):
    seen = panels["van"][0].values > 0
    assert seen.sum(0).max() <= 23 and seen.any(1).sum() == 23 == seen.any(0).sum()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"stride": 2}], ids=str)
def test_intervals_are_those_of_the_op(options):
    length = interval_figures.LENGTH
    drawn = interval_figures.intervals(interval_figures.axis(**options))
    window = axis_window(length, 5, 1, options.get("causal", False), options.get("stride", 1))
    wanted = torch.zeros(length, length).scatter(1, window.keys.clamp(max=length - 1), window.seen.float())
    for query in range(length):
        wanted[query] = torch.zeros(length).index_fill(0, window.keys[query][window.seen[query]], 1.0)
    assert torch.equal(drawn, wanted)
    inverse = interval_figures.intervals(interval_figures.axis(inverse=True, **options))
    assert torch.equal(inverse, drawn.T)


def test_a_tile_walks_over_all_that_its_owners_see():
    for options in ({}, {"inverse": True}, {"causal": True, "inverse": True}):
        of = interval_figures.axis(**options)
        seen, walked = interval_figures.intervals(of), interval_figures.walked(of)
        assert torch.equal(walked == 1, seen == 1) and (walked[seen == 0] < 1).all() and (walked > 0).sum() > seen.sum()


def test_gates_that_are_drawn_are_those_of_the_definition(panels):
    eca = panels["eca-net"][0].values
    away = (torch.arange(16)[:, None] - torch.arange(16)).abs()
    assert torch.equal(eca != 0, away <= 2)
    for panel in panels["grouped-query-vit"]:
        assert torch.equal(panel.values.sum(1), torch.ones(12))
    for panel in panels["ulsam"]:
        torch.testing.assert_close(panel.values.sum(), torch.tensor(1.0), atol=1e-4, rtol=0)
    gates = torch.stack([panel.values for panel in panels["moh"][:2]])
    assert (gates == 0).any() and (gates > 0).any() and gates.min() == 0
    assert gate_figures.INSIDE == pattern_figures.INSIDE


def test_equal_panels_give_equal_files(panels):
    first, second = (draw(panels["nat"]) for _ in range(2))
    assert first == second and first.startswith(b"<?xml") and first != draw(panels["clear"])


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_other_servers(tmp_path):
    pytest.importorskip("mkdocs", reason='needs pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]  # of --strict: warnings are errors
    inventory = (tmp_path / "site/objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    aliases = {f"foveate.fusion.{name}" for name in foveate.__all__}
    assert {f"{module}.{name}" for module, name in PUBLIC} - known - aliases == {"foveate.__version__"}
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?:)?//[^"]+"', page.read_text())
        assert loaded == [], page
    assert json.loads((tmp_path / "site/search/search_index.json").read_text())["docs"]


def test_torch_names_are_torchs():
    assert all(hasattr(nn.Module, name) or name == "reset_parameters" for name in TORCHS)
    assert Path(figures.__file__).parent == DOCS / "tools"
