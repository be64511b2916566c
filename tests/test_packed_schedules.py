"""Schedules of packed rows: which tiles documents leave over, and regions within regions."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def schedules() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        from schedules import cases, documents, dump

        yield SimpleNamespace(cases=cases, documents=documents, dump=dump)
    for name in [name for name in sys.modules if name.split(".")[0] == "schedules"]:
        del sys.modules[name]


def test_documents_are_as_long_as_those_of_c4(schedules: Any) -> None:
    ids = np.ravel(schedules.documents.packed_rows(2048))
    lengths = np.unique(ids, return_counts=True)[1][:-1]
    assert np.mean(lengths) == pytest.approx(432, rel=0.05)
    assert np.median(lengths) == pytest.approx(255, rel=0.05)
    assert np.all(np.diff(ids) >= 0)


def test_pairs_and_tiles_that_meet(schedules: Any) -> None:
    rows = np.asarray(schedules.documents.packed_rows(2048))[:9]
    seen = [np.tril(row[:, None] == row) for row in rows]
    assert schedules.documents.pairs(rows) == np.mean([np.sum(x) for x in seen])
    for block_q, block_kv in ((256, 512), (1024, 256)):
        tiles = (2048 // block_q, block_q, 2048 // block_kv, block_kv)
        meet = np.mean([np.any(x.reshape(tiles), axis=(1, 3)) for x in seen], axis=0)
        executions = schedules.cases._of_plan(block_q, block_kv, False, 2048, rows)
        # Judged for 128 positions at a time, some are computed in vain.
        computed = executions[2].runs / (schedules.cases.T // 2048)
        assert np.sum(meet) <= computed <= 1.02 * np.sum(meet) < np.sum(meet > 0)
        assert executions[2].runs == pytest.approx(sum(executions[2].inside))


def test_regions_within_a_region(schedules: Any) -> None:
    """A loop of 300 bundles; a region of 100 of them, of which 30 and 20 are conditional again."""
    schedule = schedules.dump.Schedule(
        loop=(0, 300),
        trips=7,
        regions=((0, 100), (200, 290)),
        units=("MATMUL",),
        capacity=(2,),
        usage=((1,),) * 300,
        nested=((10, 40), (60, 80), (210, 280)),
    )
    of_loop = 7 * (300 - 190)
    assert schedule.cycles((3, 2))[0] == of_loop + 3 * 100 + 2 * 90
    executions = schedules.dump.Nested(3, (2, 1)), 2
    cycles, parts = schedule.cycles(executions)
    assert cycles == of_loop + 3 * 50 + 2 * 30 + 1 * 20 + 2 * 90
    assert sum(len(part.addresses()) for part in parts) == 300
    with pytest.raises(ValueError, match="1 executions for 2 regions: 30 bundles at 0xa, 20 bund"):
        schedule.cycles((schedules.dump.Nested(3, (2,)), 2))
