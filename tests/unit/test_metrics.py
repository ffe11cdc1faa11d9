import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostcache.metrics import bucket_bounds, log_status, percentile_ns, statistics


def bucket_of(value: int) -> int:
    """As the engine does it: eight times the highest set bit, plus the three bits below it."""
    octave = value.bit_length() - 1
    return 8 * octave + ((value >> (octave - 3)) & 7 if octave >= 3 else (value << (3 - octave)) & 7)


def counters(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "requests": [0] * 6,
        "bytes": [0] * 6,
        "backend_ops": [0] * 4,
        "backend_bytes": [0] * 4,
        "latency": [[0] * 512 for _ in range(3)],
    }
    names = "get_id bad_requests errors backend_errors notifications kicks inflight inflight_max depth_sum"
    base |= dict.fromkeys((*names.split(), "depth_samples", "resubmitted"), 0)
    return base | changes


@given(st.integers(1, 2**63))
def test_every_value_lies_in_its_bucket(value: int) -> None:
    low, high = bucket_bounds(bucket_of(value))
    assert low <= value < high or value == pytest.approx(high)


@given(st.lists(st.integers(8, 10**9), min_size=1, max_size=200), st.floats(0.01, 1))
def test_a_percentile_is_off_by_one_bucket_at_most(values: list[int], share: float) -> None:
    buckets = [0] * 512
    for value in values:
        buckets[bucket_of(value)] += 1
    exact = sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
    low, high = bucket_bounds(bucket_of(exact))
    assert low * 0.999 <= percentile_ns(buckets, share) <= high * 1.001


def test_without_samples_there_are_no_means_and_no_latencies() -> None:
    fields = statistics(counters(), {})
    assert fields["latency_us"] == {"read": None, "write": None, "flush": None}
    assert fields["merge_ratio"] is None
    assert fields["mean_request_bytes"] == {"read": None, "write": None}
    assert percentile_ns([0] * 512, 0.5) == 0


def test_the_merge_ratio_is_how_many_writes_one_write_to_the_backend_stands_for() -> None:
    engine = counters(
        requests=[10, 1024, 3, 0, 0, 0],
        bytes=[40960, 4 << 20, 0, 0, 0, 0],
        backend_ops=[5, 2, 3, 0],
        backend_bytes=[20480, 4 << 20, 0, 0],
        depth_sum=64,
        depth_samples=32,
        inflight_max=4,
    )
    fields = statistics(engine, {"hits": 7, "misses": 3, "flushes_received": 3, "flushes_performed": 1})
    assert fields["requests"]["write"] == 1024
    assert fields["bytes"]["write"] == fields["backend_bytes"]["write"] == 4 << 20
    assert fields["mean_request_bytes"] == {"read": 4096, "write": 4096}
    assert fields["mean_backend_bytes"] == {"read": 4096, "write": 2 << 20}
    assert fields["merge_ratio"] == 512
    assert fields["depth"] == {"now": 0, "mean": 2.0, "max": 4}
    assert (fields["hits"], fields["flushes_received"], fields["flushes_performed"]) == (7, 3, 1)


def test_a_log_is_told_by_itself_with_what_it_costs_for_each_byte_accepted() -> None:
    levels = {"log_blocks": 1000, "log_used_blocks": 130, "volatile_blocks": 2, "lost_blocks": 1, "log_hits": 7}
    levels["unreadable_blocks"] = 3
    levels |= {"log_pace_blocks_per_s": 256, "log_wanted_blocks": 0, "log_blocked": 0}
    core = {**levels, "log_records": 4, "log_payload_blocks": 100, "hits": 1}
    engine = counters(
        bytes=[0, 100 * 4096, 0, 0, 0, 0],
        log_ops=[1, 4, 2, 6],
        log_bytes=[4096, 104 * 4096, 0, 6 * 4096],
        log_crc_errors=3,
    )
    fields = statistics(engine, core)
    assert not [key for key in fields if key.startswith("log_")]
    log = fields["log"]
    assert (log["blocks"], log["used_blocks"], log["records"], log["crc_errors"]) == (1000, 130, 4, 3)
    assert log["operations"] == {"read": 1, "write": 4, "flush": 2, "superblock": 6}
    assert log["mean_payload_bytes"] == 25 * 4096
    assert log["written_per_accepted"] == 1.1
    assert log_status(core) == {
        "log_bytes": 1000 * 4096,
        "log_used_bytes": 130 * 4096,
        "volatile_bytes": 2 * 4096,
        "unreadable_bytes": 3 * 4096,
        "lost_bytes": 4096,
        "log_hits": 7,
        "pace_bytes_per_s": 1 << 20,
        "log_full": False,
        "fails": False,
        "read_cache": None,
    }
    reads = {"read_cache_blocks": 50, "read_cache_used_blocks": 5, "read_cache_hits": 9}
    assert log_status({**core, **reads})["read_cache"] == {"bytes": 50 * 4096, "used_bytes": 5 * 4096, "hits": 9}
    assert "log" not in statistics(counters(), {"hits": 1})


def test_latencies_are_in_microseconds_by_kind() -> None:
    latency = [[0] * 512 for _ in range(3)]
    latency[1][bucket_of(100_000)] = 990
    latency[1][bucket_of(5_000_000)] = 10
    found = statistics(counters(latency=latency), {})["latency_us"]
    assert found["read"] is None
    assert found["write"]["p50"] == pytest.approx(100, rel=0.13)
    assert found["write"]["p99_9"] == pytest.approx(5000, rel=0.13)
    json.dumps(found)
