"""The authors' forms in the benchmark are the same functions; the benchmark runs and prints a row for each layer."""

import pytest
import torch

from foveate.attention_ops import aggregated_attention, flow_attention
from foveate.benchmarks import mixtures


def test_the_authors_forms_equal_our_ops():
    q, k, v = torch.randn(2, 30, 3, 4, 8).unbind(2)
    torch.testing.assert_close(mixtures.authors_flow(q, k, v), flow_attention(q, k, v), rtol=1e-4, atol=1e-4)
    for ratio, form in ((2, mixtures.authors_aggregated), (1, mixtures.authors_attention)):
        given = mixtures.moh_inputs(6, ratio, 6, 2, 2, 2)
        torch.testing.assert_close(form(**given), aggregated_attention(**given), rtol=1e-4, atol=1e-4)


def test_a_form_with_another_result_is_not_timed():
    with pytest.raises(RuntimeError, match="x: the results differ, so they are not timed"):
        mixtures.checked(lambda: torch.zeros(3), lambda: torch.ones(3), "x")


def test_rows_for_layers_and_models(capsys, monkeypatch):
    monkeypatch.setitem(mixtures.MOH, "small", (6, 2, 4, 1, 1))
    mixtures.main(["--batch", "1", "--rounds", "1", "--only", "small"])
    out = capsys.readouterr().out
    assert out.count("small") == 2 and "all heads" in out and " 50 " in out
