"""What benchmarks/tune.py makes of candidates and results; it compiles nothing here."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LOSS, ATTENTION = "log_z 16x16", "attention, complex"


@pytest.fixture(scope="module")
def tune() -> Iterator[Any]:
    pytest.importorskip("libtpu")  # Results are of its version.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import tune

        yield tune
    for name in [name for name in sys.modules if name.split(".")[0] in ("tune", "schedules")]:
        del sys.modules[name]


def test_candidates_begin_with_the_table_and_can_be_tiles(tune: Any) -> None:
    for case, tuned in tune.tiles.TUNED.items():
        for chip in ("v5p", "v6e"):
            for part in tune.tiles.PARTS:
                candidates = tuned.candidates(chip, part)
                assert candidates[0] == tuned.today(chip, part)
                assert len(set(candidates)) == len(candidates) > 8
                for a, b, within in candidates:
                    assert min(a, b, within) >= 128
                    assert (b if "attention" in case and part == "backward" else a) % within == 0


@pytest.mark.parametrize("case", [LOSS, ATTENTION])
def test_sizes_are_those_of_one_part(tune: Any, case: str) -> None:
    tuned = tune.tiles.TUNED[case]
    for part, other in (tune.tiles.PARTS, tune.tiles.PARTS[::-1]):
        request = tune.compiler.Request(case, "v5p", part, (2048, 512, 512))
        [kernel] = request.make().kernels
        as_it_is = tune.compiler.Request(case, "v5p", other, tuned.today("v5p", other)).make()
        assert as_it_is.kernels[0].executions != kernel.executions
        whole = tune.cases.CASES[case]("v5p", tuned.blocks("v5p", part, (2048, 512, 512)))
        assert kernel in whole.kernels and as_it_is.kernels[0] in whole.kernels


def test_executions_go_with_the_blocks(tune: Any) -> None:
    """On v6e, one core: 8192 positions; 16 heads of 8192 queries and keys."""

    def executions(case: str, part: str, *sizes: int) -> tuple[float, ...]:
        return tune.compiler.Request(case, "v6e", part, sizes).make().kernels[0].executions

    assert executions(LOSS, "forward", 1024, 512, 256) == (8, 8)
    assert executions(LOSS, "forward", 2048, 512, 256) == (4, 4)
    assert executions(LOSS, "backward", 2048, 512, 256) == (4, 2)  # Two groups.
    assert executions(LOSS, "backward", 4096, 512, 256) == (2, 2)
    # Rows and columns; tiles on the diagonal and below it; rows.
    squares = [8, 8, 8, 28, 8]
    assert executions(ATTENTION, "forward", 1024, 1024, 256) == tuple(16 * n for n in squares)
    # A row of 2048 queries meets two tiles of 1024 keys on the diagonal: 4 of either kind.
    wide = [8, 4, 4, 4, 12, 4, 8]
    assert executions(ATTENTION, "backward", 2048, 1024, 256) == tuple(16 * n for n in wide)


def test_goes_on_where_it_was(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    compiled = []

    def compiler(request: Any) -> Any:
        compiled.append(request.sizes)
        if len(compiled) == 2:
            raise tune.compiler.NotCompiledError("Error: out of memory")
        return {}, [(request.make().kernels[0], schedule(tune, 2))]

    monkeypatch.setattr(tune.compiler, "compiled", compiler)
    results = tmp_path / "results.jsonl"
    arguments = [LOSS, "--chips", "v5p", "--parts", "forward", f"--results={results}"]
    candidates = tune.tiles.TUNED[LOSS].candidates("v5p", "forward")
    monkeypatch.setattr(sys, "argv", ["tune.py", *arguments, "--minutes=0"])
    tune.main()
    assert not compiled
    monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
    tune.main()
    assert compiled == candidates
    whole = results.read_text()
    results.write_text("".join(whole.splitlines(keepends=True)[:5]))  # As if it had been stopped.
    tune.main()
    assert compiled == candidates + candidates[5:]
    assert len(results.read_text().splitlines()) == len(candidates)
    assert "does not compile: Error: out of memory" in capsys.readouterr().out


def schedule(tune: Any, num_regions: int, trips: int = 7) -> Any:
    """Of a kernel that was never compiled: a loop of 300 bundles, regions of 100 and 90."""
    return tune.compiler.dump.Schedule(
        loop=(0, 300),
        trips=trips,
        regions=((0, 100), (200, 290))[:num_regions],
        units=("MATMUL",),
        capacity=(2,),
        usage=((1,),) * 300,
    )


def test_table_is_ranked(tune: Any) -> None:
    today, better, broken, odd, *rest = tune.requests(LOSS, "v6e", "backward")
    measured = {"bundles": 100, "unit": "MATMUL", "share": 0.75}
    records = {
        tune.key(tune.asked(request)): record
        for request, record in (
            (broken, {"cycles": None, "why": "does not compile: too large"}),
            (odd, {"cycles": None, "why": "schedule not understood: 2 for 3"}),
            (today, {"cycles": 2000.0, **measured}),
            (better, {"cycles": 1500.0, **measured}),
        )
    }
    head, _, first, second, *others, line = tune.table(LOSS, "v6e", "backward", records)
    assert head == f"{LOSS}, backward, v6e: 4 of {4 + len(rest)} candidates"
    assert first.split()[-5:] == ["1,500", "0.750", "100", "MATMUL", "75%"]
    assert "(today)" in second and second.split()[-4] == "1.000"
    assert [other.split("  ")[-1].strip() for other in others] == [
        "does not compile: too large",
        "schedule not understood: 2 for 3",
    ]
    assert line == f'"TPU v6 lite": {better.sizes},  # backward'
    assert "4 of" not in tune.table(LOSS, "v6e", "forward", records)[0]


@pytest.mark.parametrize(
    ("part", "num_regions", "cycles"),
    [
        # On v6e: 2 tiles of 4096, two groups.
        ("forward", 2, 7 * (300 - 190) + 2 * 190),
        ("forward", 1, None),
        ("backward", 2, 7 * (300 - 190) + 2 * 190),
        ("backward", 1, 7 * (300 - 100) + 2 * 100),  # The second one was too short.
        ("backward", 0, None),
    ],
)
def test_a_schedule_that_is_not_understood_is_a_result(
    tune: Any, monkeypatch: pytest.MonkeyPatch, part: str, num_regions: int, cycles: float | None
) -> None:
    request = tune.compiler.Request(LOSS, "v6e", part, (4096, 1024, 1024))
    kernel, read = request.make().kernels[0], schedule(tune, num_regions)
    monkeypatch.setattr(tune.compiler, "compiled", lambda request: ({}, [(kernel, read, None)]))
    record = tune._try(request)
    assert record["cycles"] == cycles
    if cycles is None:
        assert record["why"].startswith("schedule not understood: ")
    else:
        assert (record["bundles"], record["unit"], record["share"]) == (300, "MATMUL", 0.5)
