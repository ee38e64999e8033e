"""The benchmark of calls: what it prints, what it refuses, and (slow) that its script runs."""

import pytest

from foveate.benchmarks import call_overhead

KINDS = ("without gradients", "with gradients", "and backward")


def test_the_faster_turn_of_both_packages_is_reported(monkeypatch, tmp_path):
    (tmp_path / "foveate").mkdir()
    (tmp_path / "foveate" / "__init__.py").touch()
    turns = iter([30.0, 71.0, 70.0, 28.0])
    monkeypatch.setattr(call_overhead, "measure", lambda folder: {"op": dict.fromkeys(KINDS, next(turns))})
    out = tmp_path / "table.txt"
    call_overhead.main(["--against", str(tmp_path), "--out", str(out)])
    assert out.read_text().count("28 (70)") == len(KINDS)


def test_a_folder_without_the_package_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        call_overhead.main(["--against", str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_measures_this_package():
    pytest.importorskip("triton")
    calls = call_overhead.measure(None)
    assert all(us > 0 for kinds in calls.values() for us in kinds.values())
    assert {kind for kinds in calls.values() for kind in kinds} >= set(KINDS)
