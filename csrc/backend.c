/* The contract of the backends: the choke point, the stack, timers and descriptors, and I/O that is waited for.
 *
 * Owns the list of an engine's backends. Decides nothing about an I/O: what a backend makes of it is that backend's business. Every
 * mistake of a backend or of the core that would lose an I/O, end it twice or touch what is not there is found here, by an assertion. */
#include "backend.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io.h"

#define SYNC_BYTES (4u << 20)

struct backend *backend_new(vhc_engine *engine, const struct backend_ops *ops, struct backend *below, char *error, size_t error_bytes)
{
    if (below && (below->above || below->volume || below->level + 1 == BACKEND_LEVELS)) {
        snprintf(error, error_bytes, below->level + 1 == BACKEND_LEVELS ? "more than %d wrappers" : "the backend is in use", BACKEND_LEVELS - 1);
        return NULL;
    }
    struct backend *backend = calloc(1, sizeof *backend);
    if (!backend) {
        snprintf(error, error_bytes, "out of memory");
        return NULL;
    }
    backend->ops = ops;
    backend->engine = engine;
    backend->due_ns = BACKEND_NEVER;
    if (below) {
        backend->below = below;
        backend->level = below->level + 1;
        backend->facts = below->facts;
        below->above = backend;
    }
    if (engine->backends.count == engine->backends.size)
        engine->backends.items = engine_grow(engine->backends.items, &engine->backends.size, sizeof backend);
    backend->number = engine->backends.count;
    engine->backends.items[engine->backends.count++] = backend;
    return backend;
}

static void forget_sync(struct backend *top);

static void destroy(struct backend *backend)
{
    if (!backend->engine->ending)
        forget_sync(backend);
    if (backend->ops->close)
        backend->ops->close(backend);
    if (backend->below)
        backend->below->above = NULL;
    for (struct backend **at = &backend->engine->push_first; *at; at = &(*at)->next_push) {
        if (*at == backend) {
            *at = backend->next_push;
            break;
        }
    }
    backend->engine->backends.items[backend->number] = NULL;
    free(backend);
}

void vhc_backend_close(vhc_backend *backend)
{
    assert(!backend->above && !backend->volume);
    while (backend) {
        struct backend *below = backend->below;
        if (backend->ops->drain)
            backend->ops->drain(backend);
        destroy(backend);
        backend = below;
    }
}

void backends_drain(vhc_engine *engine)
{
    for (uint32_t i = 0; i < engine->backends.count; i++) {
        struct backend *backend = engine->backends.items[i];
        if (backend && backend->ops->drain)
            backend->ops->drain(backend);
    }
}

void backends_destroy(vhc_engine *engine)
{
    for (uint32_t i = engine->backends.count; i-- > 0;) /* what stands on another is younger */
        if (engine->backends.items[i])
            destroy(engine->backends.items[i]);
    free(engine->backends.items);
}

/* ---- the choke point ---- */

static bool fits(const struct backend *backend, const struct io *io)
{
    const vhc_backend_facts *facts = &backend->facts;
    uint64_t bytes = 0;
    if (io->kind == IO_FLUSH)
        return !io->bytes;
    if (io->kind != IO_READ && facts->read_only)
        return false;
    if (!io->bytes || io->offset > facts->size_bytes || io->bytes > facts->size_bytes - io->offset)
        return false;
    if ((io->offset | io->bytes) & (facts->align_io_bytes - 1))
        return false;
    if (io->kind == IO_ZERO)
        return true;
    for (uint32_t i = 0; i < io->iov_count; i++) {
        if ((uintptr_t)io->iov[i].iov_base & (facts->align_mem_bytes - 1) || io->iov[i].iov_len & (facts->align_io_bytes - 1))
            return false;
        bytes += io->iov[i].iov_len;
    }
    return bytes == io->bytes && !io->iov_first;
}

static void submit(struct backend *top, struct io *io)
{
    assert(!io->at && !io->abandoned && fits(top, io));
    io->at = top;
    top->engine->submitting++;
    top->ops->submit(top, io);
    top->engine->submitting--;
}

void backend_submit(struct volume *volume, struct io *io)
{
    assert(io->volume == volume && io->target == IO_BACKEND && (!io->request || io->request->direct));
    submit(volume->backend, io);
}

void backend_pass(struct backend *backend, struct io *io)
{
    assert(io->at == backend && backend->below);
    io->at = backend->below;
    if (io->abandoned) { /* nobody waits for it any more */
        backend_done(backend->below, io, -ECANCELED);
        return;
    }
    backend->engine->submitting++;
    backend->below->ops->submit(backend->below, io);
    backend->engine->submitting--;
}

void backend_done(struct backend *backend, struct io *io, int32_t result)
{
    vhc_engine *engine = backend->engine;
    assert(io->at == backend && result <= 0 && result > -4096);
    io->at = backend->above;
    if (io->at && io->at->ops->ended && !engine->ending) {
        io->at->ops->ended(io->at, io, result);
    } else if (io->at) {
        backend_done(io->at, io, result);
    } else if (engine->submitting) { /* whoever submits does not expect it, and one could follow the other without end */
        io->result = result;
        io->next = NULL;
        *engine->ended_last = io;
        engine->ended_last = &io->next;
    } else {
        io_finish(engine, io, result);
    }
}

bool backend_abandon(struct io *io)
{
    struct backend *backend = io->at;
    assert(io->kind == IO_READ);
    while (backend && !backend->ops->abandon)
        backend = backend->below;
    return backend && backend->ops->abandon(backend, io);
}

/* ---- turns ---- */

void backends_look(vhc_engine *engine)
{
    struct io *io = engine->ended_first;
    engine->ended_first = NULL;
    engine->ended_last = &engine->ended_first;
    while (io) {
        struct io *next = io->next;
        io_finish(engine, io, io->result);
        io = next;
    }
    if (engine->now_ns >= engine->backends_due_ns) {
        engine->backends_due_ns = BACKEND_NEVER;
        for (uint32_t i = 0; i < engine->backends.count; i++) {
            struct backend *backend = engine->backends.items[i];
            if (!backend || backend->due_ns == BACKEND_NEVER)
                continue;
            uint64_t due_ns = backend->due_ns;
            if (due_ns <= engine->now_ns) {
                backend->due_ns = BACKEND_NEVER;
                due_ns = backend->ops->tick(backend, engine->now_ns);
            }
            backend_wake_at(backend, due_ns);
        }
    }
    engine->again |= engine->ended_first != NULL;
}

void backend_wake_at(struct backend *backend, uint64_t due_ns)
{
    if (due_ns < backend->due_ns)
        backend->due_ns = due_ns;
    if (due_ns < backend->engine->backends_due_ns)
        backend->engine->backends_due_ns = due_ns;
}

void backend_wants_push(struct backend *backend)
{
    if (backend->to_push)
        return;
    backend->to_push = true;
    backend->next_push = backend->engine->push_first;
    backend->engine->push_first = backend;
}

void backends_push(vhc_engine *engine)
{
    while (engine->push_first) {
        struct backend *backend = engine->push_first;
        engine->push_first = backend->next_push;
        backend->to_push = false;
        backend->ops->push(backend);
    }
}

bool backend_watch(struct backend *backend, uint32_t index, int fd, uint32_t events)
{
    return watch_add(backend->engine, fd, events, WATCH(WATCH_BACKEND, index, backend->number));
}

void backend_watch_again(struct backend *backend, uint32_t index, int fd, uint32_t events)
{
    watch_change(backend->engine, fd, events, WATCH(WATCH_BACKEND, index, backend->number));
}

void backends_ready(vhc_engine *engine, uint32_t number, uint32_t index, uint32_t events)
{
    struct backend *backend = engine->backends.items[number];
    if (backend) /* an event of a descriptor that was closed a moment ago */
        backend->ops->ready(backend, index, events);
}

void backend_event(struct backend *backend, uint64_t what, const char *format, ...)
{
    va_list arguments;
    struct backend *top = backend;
    va_start(arguments, format);
    vsnprintf(backend->message, sizeof backend->message, format, arguments);
    va_end(arguments);
    for (; top->above; top = top->above)
        memcpy(top->above->message, top->message, sizeof top->message);
    if (top->volume)
        engine_event(top->engine, VHC_EV_BACKEND, top->volume->number, what);
}

void backends_stop(struct volume *volume)
{
    for (struct backend *backend = volume->backend; backend; backend = backend->below)
        if (backend->ops->tick)
            backend_wake_at(backend, 0);
}

/* ---- what belongs to whom ---- */

bool backend_adopt(struct volume *volume, vhc_backend *top, char *error, size_t error_bytes)
{
    const char *what = NULL;
    if (!top || top->engine != volume->engine || top->above || top->volume)
        what = "the backend is in use, or there is none";
    else if (top->facts.read_only && !volume->config.read_only)
        what = "the backend is read-only, and the volume is not";
    else if (volume->size_bytes > top->facts.size_bytes || volume->size_bytes & (top->facts.align_io_bytes - 1))
        what = "the backend is smaller than the disk";
    if (what) {
        snprintf(error, error_bytes, "%s", what);
        return false;
    }
    for (struct backend *backend = top; backend; backend = backend->below)
        backend->volume = volume;
    volume->backend = top;
    volume->align_mem[IO_BACKEND] = top->facts.align_mem_bytes;
    volume->align_io[IO_BACKEND] = top->facts.align_io_bytes;
    return true;
}

void backend_release(struct volume *volume)
{
    for (struct backend *backend = volume->backend; backend; backend = backend->below)
        backend->volume = NULL;
    volume->backend = NULL;
}

void backend_grown(struct volume *volume)
{
    for (struct backend *backend = volume->backend; backend; backend = backend->below)
        if (backend->facts.size_bytes < volume->size_bytes)
            backend->facts.size_bytes = volume->size_bytes;
}

void vhc_backend_read_facts(vhc_backend *backend, vhc_backend_facts *facts)
{
    *facts = backend->facts;
}

void vhc_read_backend_stats(vhc_backend *backend, vhc_backend_stats *stats)
{
    memset(stats, 0, sizeof *stats);
    while (backend && !backend->ops->read_stats)
        backend = backend->below;
    if (backend)
        backend->ops->read_stats(backend, stats);
}

void vhc_backend_give_up(vhc_backend *backend)
{
    vhc_engine *engine = backend->engine;
    engine->submitting++; /* what ends now is reported in the next turn */
    for (; backend; backend = backend->below)
        if (backend->ops->give_up)
            backend->ops->give_up(backend);
    engine->submitting--;
}

const char *vhc_backend_message(vhc_backend *backend)
{
    return backend->message;
}

bool backend_facts_sound(const vhc_backend_facts *facts, char *error, size_t error_bytes)
{
    const char *what = NULL;
    if (!facts->size_bytes || facts->size_bytes % VBLK_SECTOR || facts->size_bytes > INT64_MAX)
        what = "the size is not a multiple of 512";
    else if (__builtin_popcount(facts->align_mem_bytes) != 1 || __builtin_popcount(facts->align_io_bytes) != 1 ||
             facts->align_io_bytes > VHC_BLOCK || facts->align_mem_bytes > (1u << 20))
        what = "an alignment is not a power of two, or more than 4096";
    else if (facts->size_bytes & (facts->align_io_bytes - 1))
        what = "the size is not a multiple of the alignment";
    if (what)
        snprintf(error, error_bytes, "%s", what);
    return !what;
}

/* ---- I/O that is waited for ---- */

/* Nobody waits for it any more: it frees itself. */
static void forget_sync(struct backend *top)
{
    if (top->sync.io)
        top->sync.io->sync_done = NULL;
    top->sync.io = NULL;
}

static bool begin_sync(struct backend *top)
{
    struct backend_sync *sync = &top->sync;
    uint64_t left = sync->bytes - sync->position, part = left < SYNC_BYTES || sync->kind == IO_ZERO ? left : SYNC_BYTES;
    const uint8_t *data = sync->kind == IO_WRITE ? sync->buffer + sync->position : NULL;
    sync->io = io_new_sync(top->engine, sync->kind, sync->offset + sync->position, part, data);
    if (!sync->io)
        return false;
    sync->done = false;
    sync->io->sync_done = &sync->done;
    submit(top, sync->io);
    return true;
}

int vhc_backend_sync_wait(vhc_backend *top)
{
    struct backend_sync *sync = &top->sync;
    while (sync->io) {
        if (!poll_backends(top->engine, &sync->done))
            return -EINTR;
        struct io *io = sync->io;
        int32_t result = io->result;
        if (!result && sync->kind == IO_READ)
            memcpy(sync->buffer + sync->position, io->bounce, io->bytes);
        sync->position += io->bytes;
        sync->io = NULL;
        io_free(top->engine, io);
        if (result)
            return result;
        if (sync->position < sync->bytes && !begin_sync(top))
            return -ENOMEM;
    }
    return 0;
}

int vhc_backend_sync_io(vhc_backend *top, uint32_t kind, uint64_t offset, void *buffer, uint64_t bytes)
{
    const vhc_backend_facts *facts = &top->facts;
    assert(!top->above && !top->volume && kind <= IO_ZERO && (buffer || kind >= IO_FLUSH));
    forget_sync(top);
    if (kind == IO_WRITE || kind == IO_ZERO)
        if (facts->read_only)
            return -EROFS;
    if (kind == IO_FLUSH)
        offset = bytes = 0;
    else if (!bytes || offset > facts->size_bytes || bytes > facts->size_bytes - offset || (offset | bytes) & (facts->align_io_bytes - 1))
        return bytes ? -EINVAL : 0;
    top->sync = (struct backend_sync){.kind = kind, .offset = offset, .bytes = bytes, .buffer = buffer};
    return begin_sync(top) ? vhc_backend_sync_wait(top) : -ENOMEM;
}
