"""The core against a plain model, in whatever order hypothesis finds: overlapping requests, parts of blocks, discards,
flushes, destages, completions in any order, faults, a front-end that leaves and comes back. Hypothesis shrinks what it
finds to a few steps."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.core.harness import Harness
from vhostcache import operations as op

SIZE = 8 * 24 + 3
CHANGES = [op.REQUEST_WRITE, op.REQUEST_DISCARD, op.REQUEST_ZERO, op.REQUEST_ZERO_UNMAP]


class CoreMachine(RuleBasedStateMachine):
    harness: Harness

    @initialize(
        slots=st.sampled_from([8, 20, 40]), object_blocks=st.sampled_from([1, 4, 16]), write_through=st.booleans()
    )
    def start(self, slots: int, object_blocks: int, write_through: bool) -> None:
        self.harness = Harness(SIZE, 3 + slots, object_blocks, acknowledge_durable=write_through)

    @rule(kind=st.sampled_from(CHANGES), sector=st.integers(0, SIZE - 1), sectors=st.integers(1, 40))
    def change(self, kind: int, sector: int, sectors: int) -> None:
        self.harness.submit(kind, sector, min(sectors, SIZE - sector))

    @rule(block=st.integers(0, SIZE // 8 - 1), blocks=st.integers(1, 6))
    def write_blocks(self, block: int, blocks: int) -> None:
        self.harness.submit(op.REQUEST_WRITE, 8 * block, 8 * min(blocks, SIZE // 8 - block))

    @rule(sector=st.integers(0, SIZE - 1), sectors=st.integers(1, 40))
    def read(self, sector: int, sectors: int) -> None:
        self.harness.submit(op.REQUEST_READ, sector, min(sectors, SIZE - sector))

    @rule()
    def flush(self) -> None:
        self.harness.submit(op.REQUEST_FLUSH)

    @rule()
    def turn(self) -> None:
        self.harness.turn()

    @precondition(lambda self: self.harness.io)
    @rule(which=st.integers(0, 30), fail=st.sampled_from([False, False, False, True]))
    def end_io(self, which: int, fail: bool) -> None:
        self.harness.end_io(which, fail)

    @rule(enabled=st.booleans())
    def switch_write_cache(self, enabled: bool) -> None:
        self.harness.volume.set_write_cache(enabled)

    @rule()
    def write_cache_unknown(self) -> None:
        self.harness.volume.write_cache_unknown()

    @rule(duration_ns=st.sampled_from([10, 2_000, 200_000_000]))
    def wait(self, duration_ns: int) -> None:
        self.harness.advance(duration_ns)

    @rule()
    def reconnect(self) -> None:
        self.harness.reconnect()

    @invariant()
    def map_holds(self) -> None:
        if hasattr(self, "harness") and not self.harness.operations:
            self.harness.map.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.settle()


CoreMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
TestCore = CoreMachine.TestCase
