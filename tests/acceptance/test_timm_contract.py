"""timm's own model tests, run against ours in a process of their own (see run_timm_tests.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_timm_tests.py")
ONE_OF_EACH_KIND = ("nat_mini", "van_b0")


def run_timm_tests(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def test_one_model_of_each_kind_keeps_timms_contract():
    done = run_timm_tests("--models", *ONE_OF_EACH_KIND)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.slow
def test_every_model_keeps_timms_contract():
    done = run_timm_tests()
    assert done.returncode == 0, done.stdout[-6000:]


def test_a_run_that_collects_no_test_is_a_failure():
    done = run_timm_tests("--models", "no_such_model", "-k", "test_model_forward")
    assert done.returncode != 0, done.stdout[-2000:]
    assert "deselected" in done.stdout and " passed" not in done.stdout


def test_tests_that_cannot_be_fetched_are_a_failure_that_says_so(tmp_path):
    nowhere = {
        "XDG_CACHE_HOME": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_CACHE_DIR": str(tmp_path),
    }
    done = run_timm_tests("--models", "no_such_model", env=os.environ | nowhere)
    assert done.returncode == 2
    assert "pip could not download the source distribution of timm==" in done.stdout
