"""The writer: records, and the group commits that make them durable.

Owns the open record, the records that are not durable yet, and the only fdatasync that may run. Invariants:
- a slot in a record never changes: whoever overwrites the block takes another slot, in the open record in the place of
  the first one, else in a later record;
- a record is sealed (given to the engine) once, and its slots and its entries in the RAM-tier file are kept until a
  fdatasync that was issued after all records up to it had been written has succeeded. Then its blocks enter the index;
- at most one fdatasync runs and one waits, for any number of flushes;
- after a failed write or fdatasync nothing is assumed: what is not durable is written again first, and until that has
  succeeded `blocked` keeps anything new from being acknowledged.
Room for the whole open record, and for the padding before it, is in the ring before anything is put into it. It never
decides what a request means, and never touches the backend.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.backoff import Backoff
from vhostcache.log import format as fmt
from vhostcache.log.index import LogIndex
from vhostcache.log.ordered import OrderedQueue
from vhostcache.map import CLEAN, ORPHAN, WRITING, Map, run_end
from vhostcache.readcache import ReadCache

EIO: Final = 5
ZEROES_MAX: Final = 64
"""Extents of zeroes in a record: with 256 data extents and as many checksums they fit one header block."""
RESERVE_MAX_BLOCKS: Final = 64
"""Of the ring, for records of what is lost: see losses.py."""
INTERNAL: Final = -1
GROUPS_LEFT: Final = 32
"""No record is begun with fewer groups left: the open one, flushes, superblocks and destages need theirs."""
ABSORBED_RECORDS: Final = 1
"""Records that enter the index in one turn, 0.2 ms."""


class Record:
    """One append. `slots`: block -> slot; open, until it is sealed."""

    __slots__ = (
        "_writer",
        "address",
        "again",
        "blocks",
        "durable",
        "entries_end",
        "header_blocks",
        "headers",
        "limit",
        "payload",
        "running",
        "seq",
        "since_ns",
        "slots",
        "vouches",
        "written",
        "zeroes",
    )

    def __init__(self, writer: "LogWriter", seq: int, address: int, headers: list[int], limit: int) -> None:
        self._writer = writer
        self.seq = seq
        self.address = address
        self.headers = headers
        self.header_blocks = len(headers)
        self.limit = limit
        """Payload blocks that it may take."""
        self.slots: dict[int, int] = {}
        self.zeroes: list[int] = []
        """Extent words of zeroes, discards and padding."""
        self.since_ns = 0
        """When the first request came into it; 0: none has, as far as `schedule` has seen."""
        self.blocks: list[int] = []
        """When sealed: its blocks in ascending order, and their slots."""
        self.payload: list[int] = []
        self.entries_end = 0
        self.vouches = 0
        """It says that everything below this address was durable when it was sealed."""
        self.running = False
        self.written = False
        self.again = False
        """A fdatasync has failed while it was being written."""
        self.durable = False
        """Its write ends when it is on the medium, and everything before it was there already."""

    @property
    def end(self) -> int:
        """The log address behind it."""
        return self.address + self.header_blocks + len(self.payload)

    @property
    def is_empty(self) -> bool:
        """Nothing has come into it."""
        return not (self.slots or self.zeroes)

    def io_done(self, result: int) -> None:
        self._writer.record_written(self, result)


class LogFlush:
    """A fdatasync of the cache file: it covers records up to `seq`, and those who wait for one."""

    __slots__ = ("_writer", "failures", "seq", "waiters")

    def __init__(self, writer: "LogWriter", seq: int, waiters: list[Callable[[int], None]]) -> None:
        self._writer = writer
        self.seq = seq
        self.waiters = waiters
        self.failures = writer.flush_failures

    def io_done(self, result: int) -> None:
        self._writer.flushed(self, result)


class Overwritten(Protocol):
    """Who has to know which blocks have newer content, before the log can forget that."""

    def drop(self, blocks: Sequence[int]) -> None: ...

    def drop_range(self, first: int, end: int) -> None: ...


class LogWriter:
    """See the module. `magic`, `epoch`: as in every header. `tail`: where the ring begins to be in use."""

    def __init__(
        self,
        block_map: Map,
        cache: ReadCache,
        io: BackendIo,
        index: LogIndex,
        notices: list[tuple[str, dict[str, object]]],
        *,
        magic: int,
        epoch: int,
        ring_blocks: int,
        head: int,
        tail: int,
        next_seq: int,
        record_blocks: int,
        entries_max: int,
        volatile_max: int,
        sync_interval_ns: int,
        flush_window_ns: int,
    ) -> None:
        assert ring_blocks >= 4 * (record_blocks + 2)
        self._map = block_map
        self._cache = cache
        self._io = io
        self._index = index
        self.notices = notices
        self.dropped: Overwritten | None = None
        self._magic = magic
        self._epoch = epoch
        self.ring_blocks = ring_blocks
        self.head = head
        """Where the next record will be, unless padding goes before it."""
        self.free_below = tail + ring_blocks
        """Addresses below this may be written: the tail of both durable superblocks is a ring away."""
        self.reading: dict[int, int] = {}
        """Log address -> reads of records from there on that are in flight."""
        self.next_seq = next_seq
        self.record_blocks = record_blocks
        self._entries_max = entries_max
        self._volatile_max = volatile_max
        self.sync_interval_ns = sync_interval_ns
        self._flush_window_ns = flush_window_ns
        self.open: Record | None = None
        self._records: deque[Record] = deque()
        """Sealed and not durable, in order."""
        self._sealed_blocks = 0
        self._written_seq = next_seq - 1
        """All records up to this one have been written."""
        self.synced_seq = next_seq - 1
        """All records up to this one are durable."""
        self.durable_seq = next_seq - 1
        """And have entered the index, which goes in slices."""
        self.durable_address = head
        self.vouched_address = head
        """Everything below it is known to be durable to whoever reads the log after a crash: a durable record, or both
        superblocks, say so. Rot there is found; above, it looks like the end of the log."""
        self.published = 0
        """Entries published in the RAM-tier file, ever; and of these, retired."""
        self._retired = 0
        self._next_tags: list[int] = []
        self._next_since_ns = op.NEVER
        self._commit_tags: list[int] = []
        self._commit_seq = 0
        self._committing = False
        self.began = False
        """A commit has begun since its reader has set this back."""
        self._sync_waiters: list[Callable[[int], None]] = []
        self._flush: LogFlush | None = None
        self.flush_failures = 0
        """So often has a fdatasync failed: what was written before such a failure may be lost."""
        self.completed: list[int] = []
        """Tags whose commit has succeeded, for the owner to complete."""
        self.blocked = False
        """The cache device is in trouble: nothing new may be acknowledged."""
        self._backoff = Backoff()
        self.ordered: OrderedQueue | None = None
        """Who wants to know which records are durable, and where guests have flushed."""
        self._to_repeat: list[Record] = []
        self.space_wanted = 0
        """Blocks, padding included, of a record that did not find room in the ring."""
        self.records_made: deque[tuple[int, int]] = deque()
        """(address, seq) of records in the ring, for the tail: not of each, so that small ones take no memory."""
        self._reserve = max(2, min(ring_blocks // 64, RESERVE_MAX_BLOCKS))
        self._mark_blocks = max(1, min(record_blocks, ring_blocks // 64))
        self.now_ns = 0
        self.counters = {
            "log_records": 0,
            "log_payload_blocks": 0,
            "log_written_blocks": 0,
            "log_fdatasyncs": 0,
            "log_durable_writes": 0,
            "log_failures": 0,
        }

    # --- putting something into the open record ---

    def take_room(self, blocks: int, zeroes: int, entries: int, urgent: bool = False) -> bool:
        """See to it that the open record can take a request of so many payload blocks and extents of zeroes, all of it.
        False: it has to wait; whatever can be done about it has been begun. `urgent`: without payload, and the log may
        be full because this is not in it."""
        if self.blocked or not self.entries_left(entries):
            return False
        record = self.open
        if record is not None:
            if record.limit > self.record_blocks:
                # Made for one large request, for which a single extent will do: its header has no room for more.
                fits = record.is_empty and self.record_blocks < blocks <= record.limit
            else:
                fits = len(record.slots) + blocks <= record.limit and len(record.zeroes) + zeroes <= ZEROES_MAX
            if fits:
                return True
            self.seal()
            if self.open is not None:  # empty, and of another size than is wanted
                self._give_up_open()
        if self._open(max(blocks, self.record_blocks), self._reserve):
            return True
        space_wanted = self.space_wanted  # what others wait for
        if not (urgent and self._open(0, 0)):
            return False
        self.space_wanted = space_wanted
        return True

    def room_for_blocks(self) -> int:
        """How many writes of one block the open record takes, whatever they overwrite; 0: they have to wait."""
        if not self.take_room(1, 0, 1):
            return 0
        record = self.open
        assert record is not None
        return min(record.limit - len(record.slots), self.entries_room())

    def entries_room(self) -> int:
        """How many entries fit the RAM-tier file now."""
        return self._entries_max - (self.published - self._retired)

    def entries_left(self, entries: int) -> bool:
        """Whether so many entries fit the RAM-tier file; if not, a commit is on its way that makes room."""
        if self.published - self._retired + entries <= self._entries_max:
            return True
        self.commit_soon()
        return False

    @property
    def accepted_seq(self) -> int:
        """The last record that anything accepted is in."""
        record = self.open
        return self.next_seq if record and not record.is_empty else self.next_seq - 1

    def commit_soon(self) -> None:
        """Slots or entries are wanted that only a commit gives back, if none has that is not in the index yet."""
        if self.durable_seq < self.synced_seq:
            return
        if not self._next_tags and not self._committing and not self.settled:
            self.commit(INTERNAL)

    def _give_up_open(self) -> None:
        record = self.open
        assert record is not None
        for slot in record.headers:
            self._map.release(slot)
        self.open = None

    def limit(self) -> int:
        """Log addresses below this may be used: not what is being read, and not what a crash would need."""
        if self.reading:
            return min(self.free_below, min(self.reading) + self.ring_blocks)
        return self.free_below

    def _take_header(self, count: int) -> list[int]:
        block_map = self._map
        missing = count - len(block_map.free)
        if missing > 0 and self._cache.evict(missing) < missing:
            return []
        slots = block_map.take(count)
        for slot in slots:
            block_map.state[slot] = ORPHAN
        return slots

    def _open(self, limit: int, reserve: int) -> bool:
        if self._io.available() < GROUPS_LEFT:
            return False  # the device is behind: records in flight have to end first
        header_blocks = 1 if limit <= self.record_blocks else -(-(fmt.HEADER_BYTES + 8 + 4 * limit) // op.BLOCK_BYTES)
        left = self.ring_blocks - self.head % self.ring_blocks
        padding = left if left < header_blocks + limit else 0
        wanted = padding + header_blocks + limit + reserve
        if self.head + wanted > self.limit():
            self.space_wanted = wanted
            return False
        headers = self._take_header(header_blocks + (1 if padding else 0))
        if not headers:
            self.commit_soon()
            return False
        if padding:
            self._pad(headers.pop(), padding)
        self.space_wanted = 0
        self.open = Record(self, self.next_seq, self.head, headers, limit)
        self._io.log_seq(self.next_seq)
        return True

    def _pad(self, header: int, blocks: int) -> None:
        record = Record(self, self.next_seq, self.head, [header], 0)
        if blocks > 1:
            record.zeroes.append(fmt.extent(0, blocks - 1, fmt.PAD))
        self._submit(record, fmt.FLAG_PAD)
        self.head += blocks

    def seal(self) -> None:
        """Give the open record to the engine, if there is anything in it."""
        record = self.open
        if record is None or record.is_empty:
            return
        self.open = None
        blocks = record.blocks = sorted(record.slots)
        slots = record.slots
        payload = record.payload = [slots[block] for block in blocks]
        self._map.set_state(payload, WRITING)
        self._sealed_blocks += len(payload)
        self._submit(record, 0)
        record.since_ns = record.since_ns or self.now_ns
        self.head = record.end

    def _submit(self, record: Record, flags: int) -> None:
        extents = record.zeroes + _runs(record.blocks)
        words = fmt.header_words(
            self._magic,
            self._epoch,
            record.seq,
            record.address,
            record.header_blocks,
            len(record.payload),
            extents,
            self.durable_seq,
            flags,
        )
        record.entries_end = self.published
        record.vouches = self.durable_address
        self._records.append(record)
        self.mark(record.address, record.seq)
        self.next_seq += 1
        self.counters["log_records"] += 1
        self.counters["log_payload_blocks"] += len(record.payload)
        self._write(record, words)

    def mark(self, address: int, seq: int) -> None:
        """The tail may move to this record, if it is not too near to the last of which that is true."""
        made = self.records_made
        if not made or address - made[-1][0] >= self._mark_blocks:
            made.append((address, seq))

    def _offset(self, address: int) -> int:
        return fmt.RING_OFFSET_BYTES + address % self.ring_blocks * op.BLOCK_BYTES

    def _write(self, record: Record, words: list[int]) -> None:
        record.running = True
        self.counters["log_written_blocks"] += record.header_blocks + len(record.payload)
        group = self._io.begin(record)
        offset = self._offset(record.address)
        self._io.log_write(group, offset, record.headers, words, record.payload, record.durable)

    # --- commits ---

    def commit(self, tag: int) -> None:
        """Complete `tag` (it turns up in `completed`) once everything accepted so far is durable."""
        if not self._next_tags:
            self._next_since_ns = self.now_ns
        self._next_tags.append(tag)

    def sync(self, waiter: Callable[[int], None]) -> None:
        """Call `waiter(result)` when a fdatasync that is issued from now on has ended."""
        self._sync_waiters.append(waiter)

    def drop_waiters(self) -> list[int]:
        """The tags that wait for commits, which forget them; our own commits go on."""
        tags = [tag for tag in self._commit_tags + self._next_tags if tag >= 0]
        self._commit_tags = [tag for tag in self._commit_tags if tag < 0]
        self._next_tags = [tag for tag in self._next_tags if tag < 0]
        return tags

    @property
    def settled(self) -> bool:
        """Everything accepted is durable."""
        return not (self._records or self._flush or (self.open and not self.open.is_empty))

    @property
    def volatile_blocks(self) -> int:
        """Blocks accepted that are not durable."""
        return self._sealed_blocks + (len(self.open.slots) if self.open else 0)

    def _volatile_since_ns(self) -> int:
        if self._records:
            return self._records[0].since_ns or self.now_ns
        record = self.open
        return record.since_ns or op.NEVER if record else op.NEVER

    def schedule(self, now_ns: int) -> int:
        """Once a turn: start what is to be started. Returns the time at which to look again, in ns."""
        self.now_ns = now_ns
        deadline_ns = op.NEVER
        if self.blocked:
            if now_ns < self._backoff.at_ns:
                return self._backoff.at_ns
            self._repeat()
            if not self.blocked:
                deadline_ns = now_ns  # for those who waited for that
        record = self.open
        if record is not None and not record.since_ns and not record.is_empty:
            record.since_ns = now_ns or 1
        # What is durable and not yet in the index counts as neither old nor much: a commit would do nothing for it.
        if not self._committing and not self._next_tags and self.durable_seq == self.synced_seq:
            since_ns = self._volatile_since_ns()
            if since_ns < op.NEVER:
                due_ns = since_ns + self.sync_interval_ns
                deadline_ns = min(deadline_ns, due_ns)
                if now_ns >= due_ns or self.volatile_blocks >= self._volatile_max:
                    self.commit(INTERNAL)
        if self._next_tags and not self._committing:
            due_ns = self._next_since_ns + self._flush_window_ns
            if now_ns >= due_ns:
                self._begin_commit()
            else:
                deadline_ns = min(deadline_ns, due_ns)
        if self._flush is None and (
            self._sync_waiters or (self._committing and self._written_seq >= self._commit_seq and not self.blocked)
        ):
            self._start_flush()
        return deadline_ns

    def _begin_commit(self) -> None:
        record = self.open
        if record is not None and not record.is_empty and self.synced_seq == self.next_seq - 1:
            # Nothing else is volatile: the engine writes it and goes on to the fdatasync without asking.
            record.durable = True
            self.counters["log_durable_writes"] += 1
            self.counters["log_fdatasyncs"] += 1
        self.seal()
        self._commit_tags, self._next_tags = self._next_tags, []
        self._commit_seq = self.next_seq - 1
        if self.ordered is not None and any(tag >= 0 for tag in self._commit_tags):
            self.ordered.cut(self.head)
        if self._commit_seq == self.synced_seq:
            self._end_commit()
            return
        self._committing = self.began = True

    def _end_commit(self) -> None:
        self.completed += [tag for tag in self._commit_tags if tag >= 0]
        self._commit_tags = []
        self._committing = False

    def _start_flush(self) -> None:
        flush = LogFlush(self, self._written_seq, self._sync_waiters)
        self._sync_waiters = []
        self._flush = flush
        self.counters["log_fdatasyncs"] += 1
        self._io.log_flush(self._io.begin(flush))

    # --- what comes back ---

    def record_written(self, record: Record, result: int) -> None:
        """A record's write has ended."""
        record.running = False
        if result < 0 or record.again:
            durable, record.durable, record.again = record.durable, False, False
            self._to_repeat.append(record)
            if result < 0:
                waiters: list[Callable[[int], None]] = []
                if durable:  # what they have written may be lost with it
                    waiters, self._sync_waiters = self._sync_waiters, waiters
                    self._sync_failed()
                self.device_failed("write", result)
                for waiter in waiters:
                    waiter(result)
            return
        record.written = True
        first = self._records[0].seq
        records = self._records
        at = self._written_seq + 1 - first
        while at < len(records) and records[at].written:
            self._written_seq += 1
            at += 1
        if record.durable:
            self._synced(record.seq)
        if self.blocked and not self._to_repeat and self._written_seq == self.next_seq - 1:
            self._succeeded()

    def flushed(self, flush: LogFlush, result: int) -> None:
        """The fdatasync has ended."""
        self._flush = None
        if result < 0:
            # What the next one would cover may have been lost with this one.
            flush.waiters += self._sync_waiters
            self._sync_waiters = []
            self._sync_failed()
            self.device_failed("flush", result)
        elif flush.failures != self.flush_failures:
            result = -EIO  # a durable write has failed meanwhile, and may have taken along what this was to cover
        else:
            self._synced(flush.seq)
        for waiter in flush.waiters:
            waiter(result)

    def _synced(self, seq: int) -> None:
        """All records up to this one are durable."""
        self.synced_seq = max(self.synced_seq, seq)
        if self._committing and self.synced_seq >= self._commit_seq:
            self._end_commit()

    def _sync_failed(self) -> None:
        self.flush_failures += 1
        self._lose()

    def absorb(self) -> bool:
        """Some records that are durable enter the index, and give back their entries and slots. True: there may be
        more, and whoever waited for what these have given back may go on."""
        records, state, index = self._records, self._map.state, self._index
        release = self._map.release
        if not (records and records[0].seq <= self.synced_seq):
            return False
        entries = 0
        for _ in range(ABSORBED_RECORDS):
            if not (records and records[0].seq <= self.synced_seq):
                break
            record = records.popleft()
            for word in record.zeroes:
                block, count, kind = fmt.split_extent(word)
                if kind == fmt.LOST:
                    index.lose(block, block + count, record.address)
                elif kind != fmt.PAD:
                    index.zero_durable(block, block + count, record.address, self.now_ns)
                    if self.dropped is not None:
                        self.dropped.drop_range(block, block + count)
            if record.blocks:
                index.add(record.blocks, record.address + record.header_blocks, self.now_ns)
                if self.dropped is not None:
                    self.dropped.drop(record.blocks)
                payload = record.payload
                first, end = payload[0], run_end(payload)
                if end and state.count(WRITING, first, end) == len(payload):
                    state[first:end] = bytes((CLEAN,)) * len(payload)
                else:
                    for slot in payload:
                        if state[slot] == WRITING:
                            state[slot] = CLEAN
                        else:
                            assert state[slot] == ORPHAN
                            release(slot)
                self._cache.admit_run(payload)
            if self.ordered is not None:
                first = record.address + record.header_blocks
                end = records[0].address if records else self.head
                self.ordered.add(record.address, first, end, record.zeroes, record.blocks, self.now_ns)
            for slot in record.headers:
                release(slot)
            self._sealed_blocks -= len(record.payload)
            entries = record.entries_end
            self.durable_seq = record.seq
            self.vouched_address = max(self.vouched_address, record.vouches)
            self.durable_address = records[0].address if records else self.head
        if entries > self._retired:
            self._retired = entries
            self._io.retire(entries)
        return True

    def _lose(self) -> None:
        """A fdatasync has failed: nothing that is not durable counts as written."""
        self._written_seq = self.synced_seq
        self._to_repeat = []
        for record in self._records:
            if record.seq <= self.synced_seq:
                continue
            record.written = False
            if record.running:
                record.again = True
            else:
                self._to_repeat.append(record)

    def device_failed(self, operation: str, result: int) -> None:
        """The cache device has failed, here or in other hands: nothing new is acknowledged until it is well again."""
        self.counters["log_failures"] += 1
        if not self.blocked:
            self.notices.append(("cache-error", {"operation": operation, "errno": -result}))
        self.blocked = True
        self._backoff.failed(self.now_ns)

    def _repeat(self) -> None:
        count = max(0, self._io.available() - GROUPS_LEFT // 2)
        records, self._to_repeat = self._to_repeat[:count], self._to_repeat[count:]
        for record in records:
            self._write(record, [])
        if not (records or self._to_repeat) and not any(record.running for record in self._records):
            self._succeeded()  # nothing was to be repeated: only a fdatasync had failed, of a superblock

    def _succeeded(self) -> None:
        self.blocked = False
        self._backoff.succeeded()
        self.notices.append(("cache-recovered", {}))


def _runs(blocks: list[int]) -> list[int]:
    """Data extents for blocks in ascending order."""
    if blocks and blocks[-1] - blocks[0] == len(blocks) - 1:
        return [fmt.extent(blocks[0], len(blocks), fmt.DATA)]
    extents: list[int] = []
    one = fmt.extent(0, 1, fmt.DATA)
    next_block = -1
    for block in blocks:
        if block == next_block:
            extents[-1] += one
        else:
            extents.append(block | one)
        next_block = block + 1
    return extents
