"""Code, commands, links and named files of every page."""

import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest
import typer
from pages import DOCS, PAGES, ROOT, blocks, commands, links, name_of, named_files

from foveate.commands.main import app

RUN = {"python", "sh"}  # languages of blocks that a test runs
SHOWN = {"bash", "text", "cpp"}  # installs, output, equations, other languages: commands in them are parsed
WITH_COMMANDS = ("docs/deploy.md", "docs/look.md", "docs/measure.md", "docs/start.md", "docs/training.md")  # minutes
SLOW = (*WITH_COMMANDS, "docs/cpu.md")  # sets the allocator of the process, and compiles
QUICK = [page for page in PAGES if name_of(page) not in SLOW and any(kind == "python" for kind, _ in blocks(page))]


def run_page(page: Path) -> None:
    """Run a page in order: blocks of Python as one script, blocks of shell commands in the same folder."""
    names: dict[str, object] = {"__name__": "page"}
    foveate = Path(sys.executable).with_name("foveate")
    for kind, block in blocks(page):
        if kind == "python":
            exec(compile(block, name_of(page), "exec"), names)
        elif kind == "sh":
            script = f'set -ef\nfoveate() {{ {foveate} "$@"; }}\n{block}'  # -f: brackets are no patterns of files
            done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", QUICK, ids=name_of)
def test_the_code_of_a_page_runs_as_one_script(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_every_block_of_code_that_can_run_is_run():
    kinds = {(name_of(page), kind) for page in PAGES for kind, _ in blocks(page)}
    assert {pair for pair in kinds if pair[1] not in RUN | SHOWN} == set()
    run = {name_of(page) for page in QUICK} | set(SLOW)
    assert {page for page, kind in kinds if kind == "python"} == run
    assert {page for page, kind in kinds if kind == "sh"} == set(WITH_COMMANDS)


@pytest.mark.slow
def test_the_commands_of_the_first_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / "start.md")
    assert Path("runs/digits/best.pth").exists() and Path("digits.onnx").stat().st_size > 0


@pytest.mark.slow
def test_the_commands_of_the_deployment_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / "deploy.md")
    assert len(Path("answers.jsonl").read_text().splitlines()) == 50
    assert Path("hub", "model.safetensors").exists() and Path("int8.onnx").stat().st_size > 0


@pytest.mark.slow
def test_the_commands_of_the_training_page_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / "training.md")
    assert len(Path("classes.csv").read_text().splitlines()) == 11
    assert [json.loads(line)["epoch"] for line in Path("runs/a/scalars.jsonl").open()] == [1, 2]
    config = json.loads(Path("hub/config.json").read_text())
    assert (config["num_classes"], config["pretrained_cfg"]["license"]) == (10, "mit")
    assert Path("runs/384/best.pth").exists() and "'digit-0'" in capfd.readouterr().out


@pytest.mark.slow
def test_the_commands_of_the_measuring_page_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / "measure.md")
    assert len(json.loads(Path("models.json").read_text())["models"]) >= 130
    pictures = ("speed.png", "growth.png", "mine/report.png")
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "'resnet50': 1.0" in capfd.readouterr().out


@pytest.mark.slow
def test_the_commands_of_the_page_about_pictures_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / "look.md")
    pictures = {"photo.png", "layers.png", "heads.png", "cam.png", "profiles.png"}
    assert {path.name for path in Path().glob("*.png")} == pictures
    assert "<canvas" in Path("page.html").read_text()


@pytest.mark.slow
def test_the_code_of_the_page_on_cpus_runs_in_a_process_of_its_own(tmp_path):
    code = "".join(code for kind, code in blocks(DOCS / "cpu.md") if kind == "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMMANDS = sorted({command for page in PAGES for command in commands(page)})
ALL = typer.main.get_command(app)


def test_pages_hold_commands():
    named = {command.split()[1] for command in COMMANDS}
    assert named >= {"train", "validate", "recipes", "export", "predict", "prune", "demo", "convert", "soup", "probe"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_a_page_is_one(line):
    name, *arguments = shlex.split(line)[1:]
    command = ALL.commands[name]
    options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    if "[--" in line or "..." in line:  # a synopsis, or the arguments of an earlier line
        assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", line)) <= options | {"--help"}
        return
    context = click.Context(command) if isinstance(command, click.Command) else command.context_class(command)
    parser = command.make_parser(context)
    parser.parse_args([word for word in arguments if not word.startswith("$")])


def test_modules_that_pages_run_exist():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    modules = set(re.findall(r"python -m (foveate(?:\.\w+)+)", text)) - {"foveate.benchmarks.NAME"}
    assert len(modules) >= 3 and [module for module in modules if find_spec(module) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    inside = [link for link in links(page) if not urlsplit(link).scheme]
    missing = [link for link in inside if link[0] != "#" and not (page.parent / link.partition("#")[0]).exists()]
    assert missing == []


def test_external_links_are_https_and_well_formed():
    found = {link for page in PAGES for link in links(page) if urlsplit(link).scheme}
    assert len(found) > 30
    wrong = [
        link
        for link in found
        if urlsplit(link).scheme != "https" or not re.fullmatch(r"[\w.-]+", urlsplit(link).netloc)
    ]
    assert wrong == []
    papers = [link for link in found if "arxiv.org" in link]
    assert [link for link in papers if not re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    places = (ROOT, page.parent, ROOT / "tests", ROOT / "docs", ROOT / "attention_ops")
    assert [path for path in named_files(page) if not any((place / path).exists() for place in places)] == []
