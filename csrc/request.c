/* Requests: taken off a ring, named by a tag while the core knows them, answered or dropped.
 *
 * Invariant: connection->outstanding counts the requests of a connection that have a tag. A request's memory outlives its tag only
 * while a direct read is still on its way into guest memory. */
#include "io.h"

#include <stdlib.h>
#include <string.h>

#define CHUNK 256

static struct request *take_free(vhc_engine *engine)
{
    struct request *request = engine->free_requests;
    if (!request) {
        struct request *chunk = calloc(CHUNK, sizeof *chunk);
        if (!chunk)
            return NULL;
        if (engine->request_chunks.count == engine->request_chunks.size)
            engine->request_chunks.items = engine_grow(engine->request_chunks.items, &engine->request_chunks.size, sizeof chunk);
        engine->request_chunks.items[engine->request_chunks.count++] = chunk;
        for (uint32_t i = 0; i < CHUNK; i++) {
            chunk[i].next = engine->free_requests;
            engine->free_requests = &chunk[i];
        }
        request = engine->free_requests;
    }
    engine->free_requests = request->next;
    return request;
}

/* NULL: no memory. The number of requests is bounded by the sizes of all rings. */
struct request *request_new(struct connection *connection, uint32_t segments)
{
    struct request *request = take_free(connection->volume->engine);
    if (!request)
        return NULL;
    request->chain = request->inline_iov;
    if (segments > VHC_INLINE_IOV && !(request->chain = malloc(segments * sizeof(struct iovec)))) {
        request->next = connection->volume->engine->free_requests;
        connection->volume->engine->free_requests = request;
        return NULL;
    }
    request->connection = connection;
    request->dropped = false;
    request->direct = 0;
    request->direct_ios = NULL;
    return request;
}

void request_free(struct request *request)
{
    vhc_engine *engine = request->connection->volume->engine;
    if (request->chain != request->inline_iov)
        free(request->chain);
    request->next = engine->free_requests;
    engine->free_requests = request;
}

static uint32_t take_tag(vhc_engine *engine)
{
    if (!engine->free_tags_count) {
        uint32_t more = engine->tags ? engine->tags : 1024;
        assert(engine->tags + more <= VHC_MAX_TAGS);
        engine->by_tag = realloc(engine->by_tag, (engine->tags + more) * sizeof *engine->by_tag);
        engine->free_tags = realloc(engine->free_tags, (engine->tags + more) * sizeof *engine->free_tags);
        assert(engine->by_tag && engine->free_tags);
        for (uint32_t tag = engine->tags + more; tag-- > engine->tags;) {
            engine->by_tag[tag] = NULL;
            engine->free_tags[engine->free_tags_count++] = tag;
        }
        engine->tags += more;
    }
    return engine->free_tags[--engine->free_tags_count];
}

static void release_tag(struct request *request)
{
    struct volume *volume = request->connection->volume;
    volume->engine->by_tag[request->tag] = NULL;
    volume->engine->free_tags[volume->engine->free_tags_count++] = request->tag;
    assert(request->connection->outstanding);
    request->connection->outstanding--;
    volume->stats.inflight--;
}

/* Hand it to the core, in this turn's results. */
void request_report(struct request *request)
{
    struct volume *volume = request->connection->volume;
    vhc_engine *engine = volume->engine;
    uint32_t n = engine->requests++;
    assert(n < VHC_MAX_TURN_REQUESTS);
    request->tag = take_tag(engine);
    engine->by_tag[request->tag] = request;
    engine->tag[n] = request->tag;
    engine->sector[n] = request->sector;
    engine->sectors[n] = request->sectors;
    bool deep = ++request->connection->outstanding >= VHC_DEEP && request->kind == VHC_REQ_READ;
    engine->what[n] = request->kind | request->flags | (deep ? VHC_REQ_DEEP : 0);
    vhc_volume_stats *stats = &volume->stats;
    if (++stats->inflight > stats->inflight_max)
        stats->inflight_max = stats->inflight;
    stats->depth_sum += stats->inflight;
    stats->depth_samples++;
}

struct request *request_by_tag(vhc_engine *engine, uint32_t tag)
{
    assert(tag < engine->tags && engine->by_tag[tag]);
    return engine->by_tag[tag];
}

void histogram_add(uint64_t *histogram, uint64_t value)
{
    unsigned top = value ? 63u - (unsigned)__builtin_clzll(value) : 0;
    unsigned next = (unsigned)(top >= 3 ? value >> (top - 3) : value << (3 - top)) & 7;
    histogram[8 * top + next]++;
}

/* The dirty log has to name every page that the guest may read: data first, then the status. */
static void log_answer(struct request *request)
{
    struct connection *connection = request->connection;
    if (request->kind == VHC_REQ_READ)
        for (uint32_t i = 0; i < request->payload_count; i++)
            memory_log_host(connection, request->payload[i].iov_base, request->payload[i].iov_len);
    memory_log_host(connection, request->status, 1);
}

void request_complete(struct request *request, uint8_t status)
{
    struct connection *connection = request->connection;
    struct volume *volume = connection->volume;
    vhc_volume_stats *stats = &volume->stats;
    static const uint8_t class[6] = {0, 1, 2, 1, 1, 1};

    assert(!request->direct);
    /* A front-end that has gone gets no answer: it submits the request again, and must not find it half answered. */
    if (connection->state == CONNECTION_ACTIVE || connection->graceful) {
        *request->status = status;
        if (memory_logs(connection))
            log_answer(request);
        queue_push(connection, &connection->queues[request->queue], request->head, request->writable_bytes);
        stats->requests[request->kind]++;
        if (status == VBLK_OK)
            stats->bytes[request->kind] += (uint64_t)request->sectors * VBLK_SECTOR;
        else
            stats->errors++;
        histogram_add(stats->latency[class[request->kind]], volume->engine->now_ns - request->popped_ns);
    }
    release_tag(request);
    request_free(request);
}

void request_drop(struct request *request)
{
    struct connection *connection = request->connection;
    assert(connection->quiescing && connection->may_drop);
    release_tag(request);
    if (request->direct && !io_abandon(request)) {
        request->dropped = true; /* io.c frees it when the last read has ended */
    } else if (connection->state == CONNECTION_ACTIVE) {
        request->next = connection->postponed;
        connection->postponed = request;
    } else {
        request_free(request);
    }
}

void requests_abandon(struct connection *connection)
{
    vhc_engine *engine = connection->volume->engine;
    for (uint32_t tag = 0; tag < engine->tags; tag++) {
        struct request *request = engine->by_tag[tag];
        if (request && request->connection == connection && request->direct_ios && request->direct_ios->group == IO_NO_GROUP)
            request_drop(request);
    }
}

void request_copy_in(const struct request *request, uint32_t offset, uint32_t bytes, uint8_t *target)
{
    const struct iovec *segment = request->payload;
    assert(request->kind == VHC_REQ_WRITE && (uint64_t)offset + bytes <= request->payload_bytes);
    while (offset >= segment->iov_len && bytes)
        offset -= (uint32_t)segment++->iov_len;
    while (bytes) {
        uint32_t part = segment->iov_len - offset < bytes ? (uint32_t)segment->iov_len - offset : bytes;
        memcpy(target, (uint8_t *)segment->iov_base + offset, part);
        target += part;
        bytes -= part;
        offset = 0;
        segment++;
    }
}

void request_copy_out(const struct request *request, uint32_t offset, uint32_t bytes, const uint8_t *source)
{
    const struct iovec *segment = request->payload;
    assert(request->kind == VHC_REQ_READ && (uint64_t)offset + bytes <= request->payload_bytes);
    while (offset >= segment->iov_len && bytes)
        offset -= (uint32_t)segment++->iov_len;
    while (bytes) {
        uint32_t part = segment->iov_len - offset < bytes ? (uint32_t)segment->iov_len - offset : bytes;
        memcpy((uint8_t *)segment->iov_base + offset, source, part);
        source += part;
        bytes -= part;
        offset = 0;
        segment++;
    }
}
