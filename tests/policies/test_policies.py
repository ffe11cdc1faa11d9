"""The read cache's policy does not fall behind what it is compared with, at a size that takes a second."""

from pathlib import Path

import pytest

from tests.policies.__main__ import HIT, SIZES, WRITTEN, Results, measure, plot, table


@pytest.fixture(scope="module")
def results() -> Results:
    return measure(2000, 20_000)


def test_it_hits_as_often_as_the_best_simple_policies_on_what_disks_see(results: Results) -> None:
    for trace in ("zipf", "scan+zipf", "loop"):
        for i, size in enumerate(SIZES):
            ours = results[trace]["vhostcache"][i][HIT]
            best = max(results[trace][other][i][HIT] for other in ("FIFO", "LRU", "CLOCK", "S3-FIFO"))
            assert ours >= best - 0.02, (trace, size)


def test_it_forgets_what_is_not_popular_any_more(results: Results) -> None:
    for ours, fifo in zip(results["shift"]["vhostcache"], results["shift"]["FIFO"], strict=True):
        assert ours[HIT] >= fifo[HIT] - 0.02


def test_it_writes_half_as_much_as_s3_fifo_at_most_where_much_gives_way(results: Results) -> None:
    for trace, policies in results.items():
        for ours, other in zip(policies["vhostcache"][:3], policies["S3-FIFO"][:3], strict=True):
            assert ours[WRITTEN] <= other[WRITTEN] / 2, trace


def test_the_table_and_the_figure_can_be_made(results: Results, tmp_path: Path) -> None:
    assert "| loop | 40 % |" in table(results, HIT)
    pytest.importorskip("matplotlib")
    plot(results, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes().startswith(b"<?xml")
