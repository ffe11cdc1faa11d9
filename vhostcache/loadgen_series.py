"""What a load did, interval by interval: the difference between two looks at the histograms of a running job.

Owns the last look. The histograms grow while they are read, so a request may be counted in the next interval; none is
lost or counted twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

PERCENTILES = (50.0, 99.0, 100.0)


class Series:
    """Intervals of a run. `look` returns, for each kind of request, the hits of each bucket until now; `bucket_ns` is a
    bucket's lower bound.
    """

    def __init__(self, look: Callable[[], dict[str, list[int]]], bucket_ns: Callable[[int], int]) -> None:
        self._look, self._bucket_ns = look, bucket_ns
        self._last = look()
        self._last_s = 0.0
        self.intervals: list[dict[str, Any]] = []

    def mark(self, now_s: float) -> None:
        """An interval ends here, so many seconds after the beginning."""
        found = self._look()
        interval: dict[str, Any] = {"begin_s": self._last_s, "end_s": now_s}
        for kind, buckets in found.items():
            hits = [new - old for new, old in zip(buckets, self._last[kind], strict=True)]
            if ios := sum(hits):
                interval[kind] = {"ios": ios, "lat_ns": self._percentiles(hits, ios)}
        self.intervals.append(interval)
        self._last, self._last_s = found, now_s

    def _percentiles(self, hits: Sequence[int], ios: int) -> dict[str, int]:
        """The upper bounds of the buckets they are in (to 1.6 %)."""
        found, seen, wanted = {}, 0, list(PERCENTILES)
        for bucket, count in enumerate(hits):
            seen += count
            while wanted and count and seen >= ios * wanted[0] / 100:
                found[f"{wanted.pop(0):.6f}"] = int(self._bucket_ns(bucket + 1)) - 1
        return found
