/* I/O on the backend and the cache file: operations cut into what the kernel takes, short transfers continued, reads of the log verified,
 * results gathered into groups.
 *
 * Invariant: group->pending counts the I/Os of a group that have not ended; connection->guest_io those that name guest memory. What the
 * guest waits for is given to the driver at once: reads, and all that concerns the log. The backend's writes and zeroing are the
 * background and wait in a queue beyond `write_depth`, in order. */
#include "io.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "syncer.h"

#define CHUNK 256
#define MAX_RETRIES 1000

bool io_create(vhc_engine *engine, char *error, size_t error_bytes)
{
    engine->zeroes = mmap(NULL, ZEROES_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (engine->zeroes == MAP_FAILED) {
        engine->zeroes = NULL;
        return false;
    }
    if (!syncs_create(engine, error, error_bytes))
        return false;
    engine->driver = engine->config.force_threads ? &io_threads_driver : &io_uring_driver;
    engine->driver_state = engine->driver->create(engine, error, error_bytes);
    if (!engine->driver_state && !engine->config.force_threads) {
        engine->driver = &io_threads_driver;
        engine->driver_state = engine->driver->create(engine, error, error_bytes);
    }
    return engine->driver_state != NULL;
}

void io_destroy(vhc_engine *engine)
{
    engine->ending = true;
    backends_drain(engine);
    if (engine->driver_state) {
        while (engine->ios_in_flight) {
            if (engine->syncer_ios)
                syncs_wait(engine);
            else
                engine->driver->wait(engine);
            io_reap(engine);
            engine->driver->flush(engine);
        }
        engine->driver->destroy(engine);
        engine->driver_state = NULL;
    }
}

uint32_t io_reap(vhc_engine *engine)
{
    return (engine->syncer_ios ? syncs_reap(engine) : 0) + engine->driver->reap(engine);
}

void io_forget(vhc_engine *engine)
{
    syncs_destroy(engine);
    for (uint32_t i = 0; i < engine->io_chunks.count; i++)
        free(engine->io_chunks.items[i]);
    free(engine->io_chunks.items);
    if (engine->zeroes)
        munmap(engine->zeroes, ZEROES_BYTES);
}

/* The number of I/Os is bounded by groups and requests. Without memory for one nothing can go on: malloc's failure is fatal here. */
static struct io *take_free(vhc_engine *engine, enum io_target target, enum io_kind kind, uint32_t segments)
{
    if (!engine->free_ios) {
        struct io *chunk = calloc(CHUNK, sizeof *chunk);
        assert(chunk);
        if (engine->io_chunks.count == engine->io_chunks.size)
            engine->io_chunks.items = engine_grow(engine->io_chunks.items, &engine->io_chunks.size, sizeof chunk);
        engine->io_chunks.items[engine->io_chunks.count++] = chunk;
        for (uint32_t i = 0; i < CHUNK; i++) {
            chunk[i].next = engine->free_ios;
            engine->free_ios = &chunk[i];
        }
    }
    struct io *io = engine->free_ios;
    engine->free_ios = io->next;
    io->next = NULL;
    io->volume = NULL;
    io->request = NULL;
    io->file = NULL;
    io->at = NULL;
    io->sync_done = NULL;
    io->kind = kind;
    io->target = target;
    io->check = CHECK_NONE;
    io->may_unmap = io->abandoned = io->remembered = false;
    io->background = target == IO_BACKEND && (kind == IO_WRITE || kind == IO_ZERO);
    io->durable = false;
    io->retries = 0;
    io->iov_first = io->iov_count = 0;
    io->bounce = NULL;
    io->buffer = -1;
    io->iov = segments <= IO_INLINE_IOV ? io->inline_iov : malloc(segments * sizeof(struct iovec));
    assert(io->iov);
    return io;
}

static struct io *io_new(struct volume *volume, enum io_target target, enum io_kind kind, uint32_t group, uint32_t segments)
{
    struct io *io = take_free(volume->engine, target, kind, segments);
    io->volume = volume;
    io->group = group;
    if (target == IO_CACHE)
        io->file = &volume->cache_file;
    assert(group < VHC_GROUPS || group == IO_NO_GROUP);
    if (group != IO_NO_GROUP)
        volume->groups[group].pending++;
    return io;
}

void io_free(vhc_engine *engine, struct io *io)
{
    if (io->iov != io->inline_iov)
        free(io->iov);
    free(io->bounce);
    if (io->remembered)
        free(io->whole);
    io->next = engine->free_ios;
    engine->free_ios = io;
}

static void add_memory(struct io *io, void *memory, size_t bytes)
{
    struct iovec *last = io->iov_count ? &io->iov[io->iov_count - 1] : NULL;
    if (last && (uint8_t *)last->iov_base + last->iov_len == (uint8_t *)memory)
        last->iov_len += bytes;
    else
        io->iov[io->iov_count++] = (struct iovec){memory, bytes};
}

/* A single segment that lies wholly in one registered piece of the slab goes without being pinned again. */
static void choose_buffer(struct io *io)
{
    struct volume *volume = io->volume;
    io->buffer = -1;
    if (!volume || volume->buffer_base < 0 || io->iov_first + 1 != io->iov_count)
        return;
    uintptr_t first = (uintptr_t)io->iov[io->iov_first].iov_base - (uintptr_t)volume->slab;
    uintptr_t last = first + io->iov[io->iov_first].iov_len - 1;
    if (last < (uint64_t)volume->config.slots * VHC_BLOCK && first >> 30 == last >> 30)
        io->buffer = volume->buffer_base + (int)(first >> 30);
}

static bool is_sync(const struct io *io)
{
    return io->kind == IO_FLUSH || io->durable;
}

void io_start(vhc_engine *engine, struct io *io)
{
    if ((io->kind == IO_READ || io->kind == IO_WRITE) && !io->request)
        choose_buffer(io);
    engine->ios_in_flight++;
    engine->syncs_in_flight += is_sync(io);
    if (is_sync(io) && io->target == IO_CACHE) {
        engine->syncer_ios++;
        syncer_submit(io->volume->log.syncer, io);
    } else {
        engine->driver->submit(engine, io);
    }
}

static void count(struct io *io)
{
    vhc_volume_stats *stats = &io->volume->stats;
    if (io->target == IO_BACKEND) {
        stats->backend_ops[io->kind]++;
        stats->backend_bytes[io->kind] += io->bytes;
    } else {
        unsigned kind = io->kind == IO_WRITE && io->bounce ? 3 : io->kind; /* a superblock */
        stats->log_ops[kind]++;
        stats->log_ops[IO_FLUSH] += io->durable;
        stats->log_bytes[kind] += io->bytes;
    }
}

static void start(struct io *io)
{
    if (io->target == IO_BACKEND)
        backend_submit(io->volume, io);
    else
        io_start(io->volume->engine, io);
}

/* Count it, and start it now or when the writes before it have ended. */
static void issue(struct io *io)
{
    struct volume *volume = io->volume;
    count(io);
    if (io->background) {
        if (volume->writes_in_flight >= volume->config.write_depth) {
            *volume->waiting_last = io;
            volume->waiting_last = &io->next;
            return;
        }
        volume->writes_in_flight++;
    }
    start(io);
}

static void write_ended(struct volume *volume)
{
    volume->writes_in_flight--;
    struct io *io = volume->waiting_first;
    if (!io)
        return;
    volume->waiting_first = io->next;
    if (!volume->waiting_first)
        volume->waiting_last = &volume->waiting_first;
    io->next = NULL;
    volume->writes_in_flight++;
    start(io);
}

/* What is left of it will be changed while it is continued. */
static void remember(struct io *io)
{
    if (io->remembered)
        return;
    io->remembered = true;
    io->whole = malloc((io->iov_count + 1) * sizeof *io->whole);
    assert(io->whole);
    memcpy(io->whole, io->iov, io->iov_count * sizeof *io->whole);
    io->whole_count = io->iov_count;
    io->whole_offset = io->offset;
    io->whole_bytes = io->bytes;
}

static void restore(struct io *io)
{
    if (!io->remembered)
        return;
    io->offset = io->whole_offset;
    io->bytes = io->whole_bytes;
    io->iov_first = 0;
    io->iov_count = io->whole_count;
    memcpy(io->iov, io->whole, io->whole_count * sizeof *io->whole);
}

/* Of a read of the log, to verify it when it has ended. */
static void check_when_read(struct io *io)
{
    io->check = CHECK_FIRST;
    remember(io);
}

static void transfer_slots(struct volume *volume, enum io_target target, enum io_kind kind, uint32_t group, uint64_t offset, uint64_t bytes,
                           const uint64_t *slots, uint32_t count, uint32_t skip, bool durable)
{
    assert(bytes && skip < VHC_BLOCK && skip + bytes <= (uint64_t)count * VHC_BLOCK && skip + bytes > (uint64_t)(count - 1) * VHC_BLOCK);
    struct io *io = NULL;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t slot = (uint32_t)slots[i];
        assert(slots[i] < volume->config.slots && slot >= (kind == IO_READ ? VHC_FIRST_SLOT : 1u));
        if (!io) {
            io = io_new(volume, target, kind, group, count - i < IO_MAX_IOV ? count - i : IO_MAX_IOV);
            io->offset = offset;
            io->bytes = 0;
            io->durable = durable;
        }
        uint32_t part = VHC_BLOCK - skip < bytes ? VHC_BLOCK - skip : (uint32_t)bytes;
        add_memory(io, slab_slot(volume, slot) + skip, part);
        io->bytes += part;
        offset += part;
        bytes -= part;
        skip = 0;
        if (io->iov_count == IO_MAX_IOV || i + 1 == count) {
            if (target == IO_CACHE && kind == IO_READ)
                check_when_read(io);
            issue(io);
            io = NULL;
        }
    }
}

void io_slots(struct volume *volume, enum io_target target, enum io_kind kind, uint32_t group, uint64_t offset, uint64_t bytes,
              const uint64_t *slots, uint32_t count, uint32_t skip)
{
    transfer_slots(volume, target, kind, group, offset, bytes, slots, count, skip, false);
}

void io_record(struct volume *volume, uint32_t group, uint64_t offset, const uint64_t *slots, uint32_t count, bool durable)
{
    transfer_slots(volume, IO_CACHE, IO_WRITE, group, offset, (uint64_t)count * VHC_BLOCK, slots, count, 0, durable);
}

/* Direct I/O refuses odd addresses and lengths: then the read goes through memory that fits, and is copied when it has ended. */
static void use_bounce(struct io *io, uint64_t align)
{
    uint64_t head = io->offset & (align - 1), bytes = (head + io->bytes + align - 1) & ~(align - 1);
    uint32_t memory_align = io->volume->align_mem[io->target];
    int problem = posix_memalign((void **)&io->bounce, memory_align > VHC_BLOCK ? memory_align : VHC_BLOCK, bytes);
    assert(!problem);
    io->bounce_skip = (uint32_t)head;
    io->bounce_bytes = (uint32_t)io->bytes;
    io->offset -= head;
    io->bytes = bytes;
    io->iov[0] = (struct iovec){io->bounce, bytes};
    io->iov_count = 1;
}

void io_direct(struct request *request, enum io_target target, enum io_kind kind, uint32_t group, uint32_t payload_offset, uint64_t offset,
               uint64_t bytes)
{
    struct volume *volume = request->connection->volume;
    assert(request->kind == (kind == IO_READ ? VHC_REQ_READ : VHC_REQ_WRITE));
    assert(bytes && payload_offset + bytes <= request->payload_bytes);
    struct io *io = io_new(volume, target, kind, group, request->payload_count);
    io->background = false; /* the guest waits for it */
    io->request = request;
    io->offset = offset;
    io->bytes = bytes;
    io->payload_offset = payload_offset;
    uintptr_t addresses = 0, lengths = offset | bytes;
    /* A checksum is of a block in one piece. */
    uint32_t align_io = target == IO_CACHE && volume->align_io[target] < VHC_BLOCK ? VHC_BLOCK : volume->align_io[target];
    const struct iovec *segment = request->payload;
    uint64_t skip = payload_offset, left = bytes;
    while (skip >= segment->iov_len)
        skip -= segment++->iov_len;
    for (; left; segment++, skip = 0) {
        uint64_t part = segment->iov_len - skip < left ? segment->iov_len - skip : left;
        add_memory(io, (uint8_t *)segment->iov_base + skip, part);
        left -= part;
    }
    for (uint32_t i = 0; i < io->iov_count; i++) {
        addresses |= (uintptr_t)io->iov[i].iov_base;
        lengths |= io->iov[i].iov_len;
    }
    if (addresses & (volume->align_mem[target] - 1) || lengths & (align_io - 1)) {
        assert(kind == IO_READ);
        use_bounce(io, target == IO_CACHE ? VHC_BLOCK : align_io);
    }
    if (target == IO_CACHE) {
        check_when_read(io);
    } else {
        io->sibling = request->direct_ios;
        request->direct_ios = io;
    }
    request->direct++;
    request->connection->guest_io++;
    issue(io);
}

void io_flush(struct volume *volume, enum io_target target, uint32_t group)
{
    assert(target == IO_BACKEND || volume->log.crcs);
    struct io *io = io_new(volume, target, IO_FLUSH, group, 0);
    io->offset = io->bytes = 0;
    issue(io);
}

/* One block from memory of its own, so that the next may be composed at once. */
void io_superblock(struct volume *volume, uint32_t group, uint64_t offset, const uint8_t *block)
{
    struct io *io = io_new(volume, IO_CACHE, IO_WRITE, group, 1);
    io->offset = offset;
    io->bytes = VHC_BLOCK;
    use_bounce(io, VHC_BLOCK);
    memcpy(io->bounce, block, VHC_BLOCK);
    issue(io);
}

static void zero_by_writing(vhc_engine *engine, struct io *io)
{
    uint64_t left = io->bytes;
    io->way = ZERO_WRITE;
    io->iov_first = io->iov_count = 0;
    while (left && io->iov_count < IO_INLINE_IOV) {
        uint64_t part = left < ZEROES_BYTES ? left : ZEROES_BYTES;
        io->iov[io->iov_count++] = (struct iovec){engine->zeroes, part};
        left -= part;
    }
}

void io_zero(struct volume *volume, uint32_t group, uint64_t offset, uint64_t bytes, bool may_unmap)
{
    assert(bytes);
    struct io *io = io_new(volume, IO_BACKEND, IO_ZERO, group, IO_INLINE_IOV);
    io->offset = offset;
    io->bytes = bytes;
    io->may_unmap = may_unmap;
    issue(io);
}

struct io *io_new_sync(vhc_engine *engine, enum io_kind kind, uint64_t offset, uint64_t bytes, const void *data)
{
    struct io *io = take_free(engine, IO_BACKEND, kind, IO_INLINE_IOV);
    io->offset = offset;
    io->bytes = bytes;
    io->background = false;
    if (kind > IO_WRITE)
        return io;
    if (posix_memalign((void **)&io->bounce, 1u << 20, bytes)) {
        io->bounce = NULL;
        io_free(engine, io);
        return NULL;
    }
    io->bounce_skip = 0;
    io->bounce_bytes = (uint32_t)bytes;
    if (data)
        memcpy(io->bounce, data, bytes);
    add_memory(io, io->bounce, bytes);
    return io;
}

static void unlink_direct(struct io *io)
{
    struct io **at = &io->request->direct_ios;
    if (io->target != IO_BACKEND)
        return;
    while (*at != io)
        at = &(*at)->sibling;
    *at = io->sibling;
}

bool io_abandon(struct request *request)
{
    struct io *io = request->direct_ios;
    while (io) {
        struct io *next = io->sibling;
        if (io->kind == IO_READ && backend_abandon(io)) {
            unlink_direct(io);
            io->abandoned = true;
            io->request = NULL;
            request->direct--;
            request->connection->guest_io--;
        }
        io = next;
    }
    return !request->direct;
}

/* A direct read has ended, well or not. */
static void leave_guest(struct io *io, int32_t result)
{
    struct request *request = io->request;
    struct connection *connection = request->connection;
    unlink_direct(io);
    connection->guest_io--;
    request->direct--;
    if (result == -EFAULT && !io->bounce)
        connection->bus_error = 1; /* the memory has been truncated away beneath us: the kernel's form of SIGBUS */
    if (request->dropped) {
        if (request->direct)
            return;
        if (connection->state == CONNECTION_ACTIVE && connection->queues[request->queue].running) {
            request->dropped = false;
            request->next = connection->postponed;
            connection->postponed = request;
        } else {
            request_free(request);
        }
        return;
    }
    if (!result && io->bounce)
        request_copy_out(request, io->payload_offset, io->bounce_bytes, io->bounce + io->bounce_skip);
}

/* A direct read that nobody has to hear of unless it has failed. */
static void finish_alone(vhc_engine *engine, struct io *io, int32_t result)
{
    struct request *request = io->request;
    if (!request) /* abandoned */
        return;
    bool dropped = request->dropped;
    leave_guest(io, result);
    if (dropped)
        return;
    if (result)
        engine_done(engine, io->volume->number, VHC_FAILED_TAG | request->tag, result);
    else
        request_complete(request, VBLK_OK);
}

void io_finish(vhc_engine *engine, struct io *io, int32_t result)
{
    struct volume *volume = io->volume;
    if (!volume) { /* vhc_backend_sync_io()'s */
        io->result = result;
        if (io->sync_done)
            *io->sync_done = true;
        else
            io_free(engine, io);
        return;
    }
    if (io->abandoned)
        result = 0;
    if (result && io->target == IO_BACKEND)
        volume->stats.backend_errors++;
    else if (result)
        volume->stats.log_errors++;
    if (io->background)
        write_ended(volume);
    if (io->group == IO_NO_GROUP) {
        finish_alone(engine, io, result);
    } else {
        struct group *group = &volume->groups[io->group];
        if (result && !group->result)
            group->result = result;
        if (io->request)
            leave_guest(io, result);
        assert(group->pending);
        if (--group->pending == 0) {
            engine_done(engine, volume->number, io->group, group->result);
            group->result = 0;
        }
    }
    io_free(engine, io);
}

/* `done` bytes were transferred, and there is more to do. */
static void advance(struct io *io, uint64_t done)
{
    io->offset += done;
    io->bytes -= done;
    while (done && io->iov_first < io->iov_count) {
        struct iovec *segment = &io->iov[io->iov_first];
        uint64_t part = segment->iov_len < done ? segment->iov_len : done;
        segment->iov_base = (uint8_t *)segment->iov_base + part;
        segment->iov_len -= part;
        done -= part;
        if (!segment->iov_len)
            io->iov_first++;
    }
}

static uint32_t align_of(const struct io *io)
{
    return io->target == IO_BACKEND ? io->at->facts.align_io_bytes : io->volume->align_io[IO_CACHE];
}

/* Is what the guest asked for all there, though what was asked of the file is not? The file may end within the last aligned piece. */
static bool bounce_suffices(const struct io *io)
{
    uint64_t got = (uint64_t)((uint8_t *)io->iov[0].iov_base - io->bounce);
    return got >= (uint64_t)io->bounce_skip + io->bounce_bytes;
}

static bool retry_zero(vhc_engine *engine, struct io *io, int32_t result)
{
    if (io->way == ZERO_WRITE || (result != -EOPNOTSUPP && result != -ENOSYS && result != -EINVAL && result != -EPERM))
        return false;
    if (io->way == ZERO_PUNCH)
        io->way = ZERO_RANGE;
    else
        zero_by_writing(engine, io);
    return true;
}

/* Once more, privately when it went into guest memory: the guest may have changed a page since it was read. */
static void read_again(struct io *io)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < io->whole_count; i++)
        bytes += io->whole[i].iov_len;
    io->check = CHECK_LAST;
    io->retries = 0;
    io->offset = io->whole_offset;
    io->bytes = bytes;
    io->iov_first = 0;
    io->iov_count = io->whole_count;
    memcpy(io->iov, io->whole, io->whole_count * sizeof *io->whole);
    if (io->request && !io->bounce) {
        use_bounce(io, VHC_BLOCK);
        io->whole[0] = io->iov[0];
        io->whole_count = 1;
    }
    count(io);
}

/* What was read has to be what was written: 0, or -EBADMSG; true: it is read again to find out. */
static bool verify(struct io *io, int32_t *result)
{
    uint32_t wrong = log_wrong_blocks(io);
    if (wrong && io->check == CHECK_FIRST) {
        read_again(io);
        return true;
    }
    if (wrong) {
        io->volume->stats.log_crc_errors += wrong;
        *result = -EBADMSG;
    }
    return false;
}

/* A file, device or server has said all that it has to say to this. */
static void settled(vhc_engine *engine, struct io *io, int32_t result)
{
    if (io->target == IO_BACKEND) {
        restore(io);
        backend_done(io->at, io, result);
    } else if (!result && io->check && verify(io, &result)) {
        io_start(engine, io);
    } else {
        io_finish(engine, io, result);
    }
}

void io_ended(vhc_engine *engine, struct io *io)
{
    int32_t result = io->result;
    bool again = false;
    engine->ios_in_flight--;
    engine->syncs_in_flight -= is_sync(io);
    engine->syncer_ios -= is_sync(io) && io->target == IO_CACHE;
    if ((result == -EINTR || result == -EAGAIN) && io->retries < MAX_RETRIES) {
        io->retries++;
        again = true;
    } else if (io->kind == IO_ZERO && io->way != ZERO_WRITE) {
        again = result < 0 && retry_zero(engine, io, result);
        result = result < 0 ? result : 0;
    } else if (io->kind != IO_FLUSH && result >= 0 && (uint64_t)result == io->bytes) {
        result = 0;
    } else if (io->kind != IO_FLUSH && result >= 0) {
        remember(io);
        if (result == 0) {
            result = io->bounce && bounce_suffices(io) ? 0 : io->kind == IO_READ ? -ENODATA : -EIO;
        } else {
            advance(io, (uint64_t)result);
            bool end = io->kind == IO_READ && io->offset & (align_of(io) - 1); /* direct I/O is cut there by the end of the file only */
            again = !end;
            result = !end || (io->bounce && bounce_suffices(io)) ? 0 : -ENODATA;
            if (again && io->kind == IO_ZERO)
                zero_by_writing(engine, io);
        }
    }
    if (again)
        io_start(engine, io);
    else
        settled(engine, io, result);
}
