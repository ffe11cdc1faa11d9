"""What the engine and the core have counted, as people and programs read it.

Owns the shape of the `statistics` event. Counters run from the start of the daemon; levels are as of now. Latencies
are from the moment a request is taken off the virtqueue to the moment its answer is on it, in microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

KINDS: Final = ("read", "write", "flush", "discard", "zero", "zero_unmap")  # the engine's order of VHC_REQ_*
BACKEND_KINDS: Final = ("read", "write", "flush", "zero")
LOG_KINDS: Final = ("read", "write", "flush", "superblock")
LATENCY_KINDS: Final = ("read", "write", "flush")  # write: discard and zeroes too
PERCENTILES: Final = {"p50": 0.5, "p99": 0.99, "p99_9": 0.999}

Counters = Mapping[str, Any]


def statistics(engine: Counters, core: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a volume's `statistics` event.

    `engine` has the fields of vhc_volume_stats, `core` is what Volume.statistics() returns.
    """
    requests, bytes_in = engine["requests"], engine["bytes"]
    operations, bytes_out = engine["backend_ops"], engine["backend_bytes"]
    writes, changed_bytes = requests[1], bytes_in[1]
    samples = engine["depth_samples"]
    return {
        "requests": dict(zip(KINDS, requests, strict=True)),
        "bytes": dict(zip(KINDS, bytes_in, strict=True)),
        "mean_request_bytes": {
            "read": _ratio(bytes_in[0], requests[0], 0),
            "write": _ratio(changed_bytes, writes, 0),
        },
        "backend_operations": dict(zip(BACKEND_KINDS, operations, strict=True)),
        "backend_bytes": dict(zip(BACKEND_KINDS, bytes_out, strict=True)),
        "mean_backend_bytes": {
            "read": _ratio(bytes_out[0], operations[0], 0),
            "write": _ratio(bytes_out[1], operations[1], 0),
        },
        # How many of the guest's writes one write to the backend stands for.
        "merge_ratio": _ratio(writes, operations[1], 2),
        "depth": {
            "now": engine["inflight"],
            "mean": _ratio(engine["depth_sum"], samples, 2),
            "max": engine["inflight_max"],
        },
        "latency_us": {kind: _latency(buckets) for kind, buckets in zip(LATENCY_KINDS, engine["latency"], strict=True)},
        "errors": engine["errors"],
        "bad_requests": engine["bad_requests"],
        "backend_errors": engine["backend_errors"],
        "resubmitted": engine["resubmitted"],
        "kicks": engine["kicks"],
        "notifications": engine["notifications"],
        "get_id": engine["get_id"],
        **{key: value for key, value in core.items() if not key.startswith("log_")},
        **({"log": _log(engine, core)} if "log_blocks" in core else {}),
    }


def log_status(core: Mapping[str, int]) -> dict[str, Any]:
    """What `status` says of a cache file: levels, in bytes, and the log's and read cache's part in the reads."""
    return {
        "log_bytes": core["log_blocks"] * 4096,
        "log_used_bytes": core["log_used_blocks"] * 4096,
        "volatile_bytes": core["volatile_blocks"] * 4096,
        "unreadable_bytes": core["unreadable_blocks"] * 4096,
        "lost_bytes": core["lost_blocks"] * 4096,
        "log_hits": core["log_hits"],
        "pace_bytes_per_s": core["log_pace_blocks_per_s"] * 4096 or None,
        "log_full": bool(core["log_wanted_blocks"]),
        "fails": bool(core["log_blocked"]),
        "read_cache": {
            "bytes": core["read_cache_blocks"] * 4096,
            "used_bytes": core["read_cache_used_blocks"] * 4096,
            "hits": core["read_cache_hits"],
        }
        if "read_cache_blocks" in core
        else None,
    }


def _log(engine: Counters, core: Mapping[str, int]) -> dict[str, Any]:
    """Of a volume with a cache file: its log."""
    operations, bytes_out = engine["log_ops"], engine["log_bytes"]
    accepted = engine["bytes"][1]
    own = {key.removeprefix("log_"): value for key, value in core.items() if key.startswith("log_")}
    return {
        **own,
        "operations": dict(zip(LOG_KINDS, operations, strict=True)),
        "bytes": dict(zip(LOG_KINDS, bytes_out, strict=True)),
        "mean_payload_bytes": _ratio(own["payload_blocks"] * 4096, own["records"], 0),
        # What the cache device has to write for each byte that the guest does.
        "written_per_accepted": _ratio(bytes_out[1] + bytes_out[3], accepted, 3),
        "crc_errors": engine["log_crc_errors"],
    }


def _ratio(part: int, whole: int, digits: int) -> float | int | None:
    """None where nothing has been counted: there is no mean of nothing."""
    if not whole:
        return None
    value = round(part / whole, digits)
    return value if digits else int(value)


def _latency(buckets: Sequence[int]) -> dict[str, float] | None:
    if not any(buckets):
        return None
    return {name: round(percentile_ns(buckets, share) / 1000, 1) for name, share in PERCENTILES.items()}


def percentile_ns(buckets: Sequence[int], share: float) -> float:
    """The value below which that share of the samples lies, read linearly within its bucket. 0 without samples.

    Bucket 8 * m + f holds the values whose highest set bit is m and whose next three bits are f.
    """
    total = sum(buckets)
    wanted = share * total
    below = 0
    for bucket, count in enumerate(buckets):
        if count and below + count >= wanted:
            low, high = bucket_bounds(bucket)
            return low + (high - low) * (wanted - below) / count
        below += count
    return 0.0


def bucket_bounds(bucket: int) -> tuple[float, float]:
    """From the first value of a bucket to the first of the next."""
    octave, part = divmod(bucket, 8)
    return (8 + part) * 2.0 ** (octave - 3), (9 + part) * 2.0 ** (octave - 3)
