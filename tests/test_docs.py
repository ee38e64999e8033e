"""The code blocks of the pages that promise to run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["from-natten.md"])
def test_the_code_of_a_page_runs_as_one_script(page):
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 1
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def run_page(page: str) -> None:
    """Run a page in order: blocks of Python as one script, blocks of shell commands in the same folder."""
    names: dict[str, object] = {}
    blocks = re.findall(r"^```(python|sh)\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert {kind for kind, _ in blocks} == {"python", "sh"}
    foveate = Path(sys.executable).with_name("foveate")
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, page, "exec"), names)
            continue
        commands = f'set -ef\nfoveate() {{ {foveate} "$@"; }}\n{block}'  # -f: brackets are no patterns of files
        done = subprocess.run(["bash", "-c", commands], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_commands_of_the_deployment_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page("deploy.md")
    assert len(Path("answers.jsonl").read_text().splitlines()) == 50
    assert Path("hub", "model.safetensors").exists() and Path("int8.onnx").stat().st_size > 0


@pytest.mark.slow
def test_the_commands_of_the_training_page_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run_page("training.md")
    assert len(Path("classes.csv").read_text().splitlines()) == 11
    assert [json.loads(line)["epoch"] for line in Path("runs/a/scalars.jsonl").open()] == [1, 2]
    config = json.loads(Path("hub/config.json").read_text())
    assert (config["num_classes"], config["pretrained_cfg"]["license"]) == (10, "mit")
    assert Path("runs/384/best.pth").exists() and "'digit-0'" in capfd.readouterr().out


@pytest.mark.slow
def test_the_commands_of_the_measuring_page_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run_page("measure.md")
    assert len(json.loads(Path("models.json").read_text())["models"]) >= 130
    assert all(
        Path(name).read_bytes().startswith(b"\x89PNG") for name in ("speed.png", "growth.png", "mine/report.png")
    )
    assert "'resnet50': 1.0" in capfd.readouterr().out


@pytest.mark.slow
def test_the_commands_of_the_page_about_pictures_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page("look.md")
    pictures = {"photo.png", "layers.png", "heads.png", "cam.png", "profiles.png"}
    assert {path.name for path in Path().glob("*.png")} == pictures
    assert "<canvas" in Path("page.html").read_text()


def test_every_page_is_listed_in_the_readme():
    readme = (DOCS.parent / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name})" not in readme] == []
