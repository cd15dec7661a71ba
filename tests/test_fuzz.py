"""Whatever comes from outside is read, or refused with one message: a few inputs of every kind (tests/fuzzing).

`python benchmarks/fuzz.py` tries millions, guided by coverage.
"""

from __future__ import annotations

from collections import Counter

import pytest
from fuzzing.targets import Target, targets, try_input, warm_up
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES, SLOW = 200, 20


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_an_input_is_read_or_refused(target: Target) -> None:
    seen: Counter[str] = Counter()
    warm_up(target)

    @settings(
        max_examples=SLOW if target.slow else EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def each(data: st.DataObject) -> None:
        content = target.make(lambda below: data.draw(st.integers(0, below - 1)))
        outcome, finding = try_input(target, content)
        assert finding is None, f"{content!r}\n{finding.trace}"
        seen[outcome] += 1

    each()
    assert seen["read"], seen  # the seeds are sound


def test_a_fault_of_ours_is_a_finding() -> None:
    def fail(_content: bytes) -> None:
        raise KeyError("x")

    def hang(_content: bytes) -> None:
        while True:
            pass

    for read, what in ((fail, "KeyError"), (hang, "TooSlowError")):
        outcome, finding = try_input(Target("broken", lambda _choose: b"", read), b"", seconds=0.05)
        assert outcome == "finding"
        assert finding is not None and finding.what.startswith(what)
