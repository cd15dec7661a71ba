"""docs/scaling.md quotes what benchmarks/scaling.py computes today."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import RESULT, Case, communication_table, host_table, memory_table, parts_table, result

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_page_has_the_figures_of_the_script() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    for table in (memory_table(), communication_table(), host_table(), parts_table(Case("70B"))):
        assert table in page
    assert (ROOT / RESULT).read_text() == result()


def test_shapes_are_those_of_the_models() -> None:
    """7.24 billion parameters of Mistral 7B, 68.98 of Llama 2 70B; a mixture has every MLP twice, and routers."""
    count = {name: sum(weight.numel() for weight in scaling.on_meta(name).parameters()) for name in scaling.CONFIGS}
    assert (count["7B"], count["70B"]) == (7_241_732_096, 68_976_648_192)
    config = scaling.CONFIGS["7B"]
    mlps = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    assert count["2x7B"] == count["7B"] + mlps + config.num_hidden_layers * 2 * config.hidden_size
