"""Published accuracies and counted figures: one place each, and every page that shows them says the same."""

import re
from pathlib import Path

import pytest
from timm.models import get_pretrained_cfg, is_model

import foveate
from foveate.backbones import figures
from foveate.backbones.figures import count_figures, recorded_figures, sizes
from foveate.backbones.published import TOP1, Published, full_name, published_top1
from foveate.train import load_recipe
from foveate.train.catalog import catalog

ROOT = Path(foveate.__file__).parent
CELLS = re.compile(r"`([\w{},]+)`")


def names_in(cell: str) -> list[str]:
    """Models that a table's first cell names: whole names, or ends of names that follow a whole one."""
    found: list[str] = []
    for part in CELLS.findall(cell):
        first = found[0] if found else ""
        known = [first[:cut] + part for cut in range(len(first), -1, -1) if is_model(first[:cut] + part)]
        if not known:
            return []
        found.append(known[0])
    return found


def rows_of(page: str) -> list[tuple[list[str], dict[str, str]]]:
    """Models and cells, by title, of the table rows whose first cell names models and nothing else."""
    found, titles = [], []
    for line in (ROOT / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| model"):
            titles = cells
        models = names_in(cells[0]) if line.startswith("| `") and "…" not in cells[0] else []
        if models and cells[0].count("`") == 2 * len(models) and len(cells) == len(titles):
            found.append((models, dict(zip(titles, cells, strict=True))))
    return found


def shown(value: str, count: int) -> list[str | None]:
    """`81.4 / 83.8 (384: 84.7)` as one text per model, without other image sizes; None where nothing is published."""
    values = [re.sub(r"\(.*?\)", "", part).strip() for part in value.split(" / ")]
    values = values * count if len(values) == 1 else values
    assert len(values) == count, value
    return [None if text == "-" else text for text in values]


def default(name: str) -> Published | None:
    cfg = get_pretrained_cfg(name)
    assert cfg is not None
    return published_top1(full_name(cfg), cfg.input_size[-1])


@pytest.mark.parametrize(("page", "title", "least"), [("docs/models.md", "top-1", 50), ("README.md", "top-1, %", 0)])
def test_pages_show_the_published_accuracies(page, title, least):
    compared = 0
    for models, cells in rows_of(page):
        if title not in cells:
            continue
        for name, text in zip(models, shown(cells[title], len(models)), strict=True):
            known = default(name)
            assert text == (None if known is None else f"{known.top1:.1f}"), name
            compared += 1
        for px, top1 in re.findall(r"(\d+): ([\d.]+)", cells[title]):
            others = [entry for key, entry in TOP1.items() if key.partition(".")[0] in models]
            assert f"{px}: {top1}" in {f"{entry.px}: {entry.top1:.1f}" for entry in others}
    assert compared >= least


def test_pages_show_the_counted_parameters():
    recorded, compared = recorded_figures(), 0
    for models, cells in rows_of("docs/models.md"):
        text = cells.get("params", cells.get("parameters", "-"))
        if text.endswith(" M"):
            for name, shown_text in zip(models, shown(text.removesuffix(" M"), len(models)), strict=True):
                params = recorded[name, get_pretrained_cfg(name).input_size[-1]].params / 1e6
                assert float(shown_text) == pytest.approx(params, abs=0.051), name
                compared += 1
    assert compared > 60


def test_recipes_say_the_published_accuracy():
    compared = 0
    for entry in catalog("*in1k*"):
        if entry.published is None or "," in entry.published:  # several: with weights removed
            continue
        if (known := published_top1(entry.model, load_recipe(entry.name).data.img_size)) is not None:
            assert float(entry.published) == pytest.approx(known.top1, abs=0.051), entry.name
            compared += 1
    assert compared > 40


def test_a_name_without_a_tag_means_the_default_weights_at_their_size():
    assert published_top1("litv2_base", 224).weights == "litv2_base.in1k"
    assert published_top1("litv2_base", 384).weights == "litv2_base.in1k_384"  # other weights of the model
    assert published_top1("litv2_base.in1k", 384) is None
    assert published_top1("biformer_tiny", 224).top1 == 81.4  # no weights to download
    assert published_top1("convnext_tiny", 224).weights == "convnext_tiny.fb_in1k"
    assert published_top1("van_b5", 224) is None


def test_every_published_name_is_a_model():
    for name, entry in TOP1.items():
        cfg = get_pretrained_cfg(name)
        assert full_name(cfg) == name and 60 < entry.top1 < 90 and entry.source
        if name.partition(".")[0] in foveate.list_models():
            assert cfg.input_size[-1] == entry.px, name


def test_figures_are_recorded_for_every_model_and_size():
    assert set(recorded_figures()) == set(sizes(foveate.list_models()))


@pytest.mark.parametrize("weights", ["nat_mini.in1k", "fv_halonet26t.a1h_in1k", "ninformer.untrained", "van_b0.in1k"])
def test_recorded_figures_are_those_of_the_code(weights):
    counted = count_figures(weights)
    assert recorded_figures()[counted.model, counted.px] == counted


@pytest.mark.slow
@pytest.mark.parametrize("weights", sizes(foveate.list_models()).values())
def test_every_recorded_figure_is_that_of_the_code(weights):
    counted = count_figures(weights)
    assert recorded_figures()[counted.model, counted.px] == counted


def test_the_file_is_written_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FILE", tmp_path / "figures.csv")
    monkeypatch.setattr(figures, "list_models", lambda: ["ninformer"])
    figures.main()
    figures._read.cache_clear()
    try:
        assert list(recorded_figures()) == [("ninformer", 32)]
    finally:
        figures._read.cache_clear()
