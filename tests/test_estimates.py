"""XLA's estimates of a program, as benchmarks/tpu_schedule.py sums them."""

import sys
from pathlib import Path

import pytest

TEXT = """
%fused (x: f32[8]) -> f32[8] {
  ROOT %add = f32[8] add(%x, %x)
}

%usual.1 (x: f32[8]) -> f32[8] {
  ROOT %f = f32[8] fusion(%x), calls=%fused, backend_config={"estimated_cycles":"20"}
}

%of_rare (x: f32[8]) -> f32[8] {
  ROOT %f = f32[8] fusion(%x), calls=%fused, backend_config={"estimated_cycles":"3000"}
}

%rare.2 (x: f32[8]) -> f32[8] {
  ROOT %w = f32[8] while(%x), condition=%test, body=%of_rare
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %g = f32[8] fusion(%x), calls=%fused, backend_config={"estimated_cycles":"100"}
  %s = f32[8] fusion(%x), calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %c = f32[8] conditional(%p, %g, %s), branch_computations={%usual.1, %rare.2}
}
"""


def test_the_second_branch_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from schedules import estimates

    assert estimates.cycles(TEXT) == 120
    assert estimates.cycles(TEXT.replace("%usual.1, %rare.2", "%rare.2, %usual.1")) == 3100
    for name in [name for name in sys.modules if name.split(".")[0] == "schedules"]:
        del sys.modules[name]
