/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The load itself: one thread drives one queue. It keeps `depth` requests in flight, flushes with everything drained as fio does,
 * measures, and checks what it reads. It owns its part of the shared memory and its range of the disk; threads share nothing but
 * the job's stop word. */
#include "loadgen.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"
#include "ring.h"

#define PAGE 4096u
#define SECTOR 512u
#define NO_STATUS 0xff          /* what we put into the status byte: the server has to overwrite it */
#define SPINS_PER_LOOK 128      /* spins between two looks at the clock and the stop word */
#define SLEEP_SLICE_MS 100      /* longest sleep between two looks at the stop word */
#define NEVER UINT64_MAX

/* One request's line of shared memory. */
typedef struct {
    struct virtio_blk_outhdr header;
    struct virtio_blk_discard_write_zeroes range;
    uint8_t status;
    uint8_t pad[64 - 33];
} slot_memory;

_Static_assert(sizeof(slot_memory) == 64, "one cache line a request");

/* What is to be done next, as the generator says. */
typedef struct {
    uint32_t kind;
    uint32_t sequence; /* of writes that are verified */
    uint64_t block;    /* in the queue's range */
} operation;

typedef struct {
    operation op;
    uint64_t started_ns;
    uint32_t laid_out; /* kind whose chain the descriptors hold now, LG_KINDS = none */
    bool active;
} slot;

typedef struct {
    struct lg_job *job;
    const lg_config *config;
    lg_queue_config at;
    uint32_t index;
    pthread_t thread;
    ring ring;
    uint8_t *tables, *payload;
    slot_memory *lines;
    slot *slots;
    uint16_t *idle; /* stack of slots not in flight */
    uint32_t idle_count, in_flight, chain; /* chain: descriptors a request */
    uint64_t payload_bytes;                /* of one slot */
    /* the generator */
    uint32_t phase;
    uint64_t random, next_block, generated;
    uint32_t sequence;
    operation pending; /* generated, but it overlaps one in flight */
    bool has_pending, ended;
    uint32_t unflushed; /* writes since the last flush */
    bool flushing, flushed_at_end;
    /* verification: the newest write of each piece that was acknowledged, and that was issued */
    uint32_t *acked, *issued;
    uint64_t pieces;
    uint64_t now_ns, deadline_ns;
    uint64_t completed; /* read by lg_progress */
    lg_result result;
} queue;

struct lg_job {
    lg_config config;
    queue *queues;
    pthread_mutex_t lock;
    pthread_cond_t ended;
    uint32_t running;
    uint32_t started; /* threads to be joined */
    int stop;         /* 0 go on, 1 finish what is in flight, 2 at once */
    uint8_t *memory;
    char why[256];
};

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t align_up(uint64_t value, uint64_t to)
{
    return (value + to - 1) / to * to;
}

/* ---- failures ---- */

__attribute__((format(printf, 2, 3))) static void fail(queue *q, const char *format, ...)
{
    va_list arguments;

    if (q->result.error[0]) {
        return;
    }
    va_start(arguments, format);
    vsnprintf(q->result.error, sizeof q->result.error, format, arguments);
    va_end(arguments);
    __atomic_store_n(&q->job->stop, 2, __ATOMIC_RELEASE);
}

static int stop_word(const queue *q)
{
    return __atomic_load_n(&q->job->stop, __ATOMIC_ACQUIRE);
}

static const char *kind_name(uint32_t kind)
{
    static const char *const names[LG_KINDS] = {"read", "write", "discard", "write zeroes", "flush"};

    return names[kind];
}

static uint64_t disk_offset(const queue *q, uint64_t block)
{
    return q->at.offset_bytes + block * q->config->block_bytes;
}

/* ---- statistics ---- */

static uint32_t bucket_of(uint64_t ns)
{
    uint32_t shift;

    if (ns < 128) {
        return (uint32_t)ns;
    }
    shift = 63 - (uint32_t)__builtin_clzll(ns) - 6; /* the top seven bits count */
    return (shift << 6) + (uint32_t)(ns >> shift);
}

uint64_t lg_bucket_ns(uint32_t bucket)
{
    if (bucket < 128) {
        return bucket;
    }
    return (uint64_t)((bucket & 63) + 64) << ((bucket >> 6) - 1);
}

static void count(queue *q, uint32_t kind, uint64_t bytes, uint64_t ns)
{
    lg_result *r = &q->result;

    if (!r->requests[kind] || ns < r->min_ns[kind]) {
        r->min_ns[kind] = ns;
    }
    if (ns > r->max_ns[kind]) {
        r->max_ns[kind] = ns;
    }
    r->requests[kind]++;
    r->bytes[kind] += bytes;
    r->sum_ns[kind] += (double)ns;
    r->square_ns[kind] += (double)ns * (double)ns;
    r->histogram[kind][bucket_of(ns)]++;
    __atomic_store_n(&q->completed, q->completed + 1, __ATOMIC_RELAXED);
}

/* ---- verification ---- */

static uint64_t pieces_per_block(const queue *q)
{
    return q->config->block_bytes / q->config->verify_bytes;
}

static void stamp(queue *q, const operation *op, uint8_t *payload)
{
    uint32_t bytes = q->config->verify_bytes;

    for (uint64_t i = 0; i < pieces_per_block(q); i++) {
        pattern_fill(payload + i * bytes, bytes, disk_offset(q, op->block) + i * bytes, op->sequence, q->config->seed);
    }
}

static void expect_issued(queue *q, const operation *op)
{
    uint64_t n = pieces_per_block(q);

    for (uint64_t i = op->block * n; i < (op->block + 1) * n; i++) {
        q->issued[i] = op->sequence;
    }
}

static void expect_acked(queue *q, const operation *op)
{
    uint64_t n = pieces_per_block(q);

    for (uint64_t i = op->block * n; i < (op->block + 1) * n; i++) {
        q->acked[i] = op->sequence;
    }
}

/* Pieces never written may hold anything. A write that was issued and not acknowledged may have happened or not; only after an
 * acknowledged one is nothing but it, or a later one, right. */
static void check_payload(queue *q, const operation *op, const uint8_t *payload)
{
    uint32_t bytes = q->config->verify_bytes;
    uint64_t first = op->block * pieces_per_block(q);

    for (uint64_t i = 0; i < pieces_per_block(q); i++) {
        uint32_t acked = q->acked[first + i], issued = q->issued[first + i];
        uint64_t offset = disk_offset(q, op->block) + i * bytes;
        const uint8_t *piece = payload + i * bytes;
        char why[256], expected[64];

        if (!acked) {
            continue;
        }
        q->result.verified++;
        if (q->config->kind == LG_ZERO) {
            if (!pattern_is_zero(piece, bytes)) {
                fail(q, "verification failed at offset %" PRIu64 ": expected zeroes, found other data", offset);
            }
            continue;
        }
        if (pattern_check(piece, bytes, offset, acked, issued, q->config->seed, why, sizeof why)) {
            continue;
        }
        snprintf(expected, sizeof expected, acked == issued ? "write %u" : "write %u to %u", acked, issued);
        fail(q, "verification failed at offset %" PRIu64 ": expected %s (seed %" PRIu64 "), %s", offset, expected, q->config->seed, why);
        return;
    }
}

/* Two requests in flight on one block make no promise about which is the later, unless both read. */
static bool overlaps_in_flight(const queue *q, const operation *op)
{
    for (uint32_t i = 0; i < q->config->depth; i++) {
        const slot *s = &q->slots[i];

        if (s->active && s->op.kind != LG_FLUSH && s->op.block == op->block && (s->op.kind != LG_READ || op->kind != LG_READ)) {
            return true;
        }
    }
    return false;
}

/* ---- the generator: a pure function of seed, queue and position, so that a verification can repeat it ---- */

static uint64_t random_below(queue *q, uint64_t limit)
{
    return (uint64_t)((unsigned __int128)random_next(&q->random) * limit >> 64);
}

static bool generate_load(queue *q, operation *op)
{
    const lg_config *c = q->config;

    if ((c->requests && q->generated == c->requests) || q->now_ns >= q->deadline_ns) {
        return false;
    }
    op->kind = c->read_percent == 100 ? LG_READ : c->kind;
    if (c->read_percent > 0 && c->read_percent < 100) {
        op->kind = random_below(q, 100) < c->read_percent ? LG_READ : c->kind;
    }
    op->block = c->random ? random_below(q, q->at.blocks) : q->next_block++ % q->at.blocks;
    if (op->kind != LG_READ) {
        op->sequence = ++q->sequence;
    }
    q->generated++;
    return true;
}

static bool generate_verification(queue *q, operation *op)
{
    uint64_t n = pieces_per_block(q);

    for (; q->next_block < q->at.blocks; q->next_block++) {
        for (uint64_t i = q->next_block * n; i < (q->next_block + 1) * n; i++) {
            if (q->acked[i]) {
                *op = (operation){.kind = LG_READ, .block = q->next_block++};
                return true;
            }
        }
    }
    return false;
}

static bool generate(queue *q, operation *op)
{
    return q->phase == LG_VERIFY ? generate_verification(q, op) : generate_load(q, op);
}

static void reset_generator(queue *q, uint32_t phase)
{
    q->phase = phase;
    q->random = q->config->seed ^ (uint64_t)q->index << 56;
    q->next_block = q->generated = 0;
    q->sequence = 0;
    q->has_pending = q->ended = q->flushing = false;
    q->flushed_at_end = phase != LG_RUN || !q->config->flush_at_end;
    q->unflushed = 0;
}

/* ---- chains: slot i owns the ring's descriptors from i * chain on, or one descriptor and an indirect table ---- */

static uint64_t guest(const queue *q, const void *p)
{
    return q->config->guest_address + (uint64_t)((const uint8_t *)p - q->job->memory);
}

static uint8_t *slot_payload(const queue *q, uint32_t i)
{
    return q->payload + i * q->payload_bytes;
}

static uint16_t slot_head(const queue *q, uint32_t i)
{
    return (uint16_t)(q->config->indirect ? i : i * q->chain);
}

/* Header, payload or range, status. `base` is the index of the first descriptor within its table. */
static uint32_t build_chain(queue *q, uint32_t i, uint32_t kind, struct vring_desc *d, uint32_t base)
{
    slot_memory *line = &q->lines[i];
    uint32_t n = 0;

    d[n++] = (struct vring_desc){.addr = guest(q, &line->header), .len = sizeof line->header, .flags = VRING_DESC_F_NEXT};
    if (kind == LG_READ || kind == LG_WRITE) {
        uint16_t flags = VRING_DESC_F_NEXT | (kind == LG_READ ? VRING_DESC_F_WRITE : 0);
        uint32_t left = q->config->block_bytes;

        for (uint8_t *p = slot_payload(q, i); left > 0;) {
            uint32_t bytes = left < q->config->segment_bytes ? left : q->config->segment_bytes;

            d[n++] = (struct vring_desc){.addr = guest(q, p), .len = bytes, .flags = flags};
            p += bytes;
            left -= bytes;
        }
    } else if (kind != LG_FLUSH) {
        d[n++] = (struct vring_desc){.addr = guest(q, &line->range), .len = sizeof line->range, .flags = VRING_DESC_F_NEXT};
    }
    d[n++] = (struct vring_desc){.addr = guest(q, &line->status), .len = 1, .flags = VRING_DESC_F_WRITE};
    for (uint32_t j = 0; j + 1 < n; j++) {
        d[j].next = (uint16_t)(base + j + 1);
    }
    return n;
}

static void lay_out(queue *q, uint32_t i, uint32_t kind)
{
    struct vring_desc *own = &q->ring.descriptors[slot_head(q, i)];

    if (q->config->indirect) {
        struct vring_desc *table = (struct vring_desc *)(q->tables + (uint64_t)i * q->chain * sizeof *table);
        uint32_t n = build_chain(q, i, kind, table, 0);

        *own = (struct vring_desc){.addr = guest(q, table), .len = n * (uint32_t)sizeof *table, .flags = VRING_DESC_F_INDIRECT};
    } else {
        build_chain(q, i, kind, own, slot_head(q, i));
    }
    q->slots[i].laid_out = kind;
}

static uint32_t virtio_type(uint32_t kind)
{
    static const uint32_t types[LG_KINDS] = {VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES,
                                             VIRTIO_BLK_T_FLUSH};

    return types[kind];
}

static void issue(queue *q, const operation *op)
{
    uint32_t i = q->idle[--q->idle_count];
    slot *s = &q->slots[i];
    slot_memory *line = &q->lines[i];
    uint64_t sector = op->kind == LG_FLUSH ? 0 : disk_offset(q, op->block) / SECTOR;
    bool ranged = op->kind == LG_DISCARD || op->kind == LG_ZERO;

    line->header = (struct virtio_blk_outhdr){.type = virtio_type(op->kind), .sector = ranged ? 0 : sector};
    line->status = NO_STATUS;
    if (ranged) {
        line->range = (struct virtio_blk_discard_write_zeroes){.sector = sector, .num_sectors = q->config->block_bytes / SECTOR};
    }
    if (s->laid_out != op->kind) {
        lay_out(q, i, op->kind);
    }
    if (q->config->verify && op->kind != LG_READ && op->kind != LG_FLUSH) {
        if (op->kind == LG_WRITE) {
            stamp(q, op, slot_payload(q, i));
        }
        expect_issued(q, op);
        q->now_ns = now(); /* the checksum is not the server's time */
    }
    s->op = *op;
    s->started_ns = q->now_ns;
    s->active = true;
    q->in_flight++;
    ring_add(&q->ring, slot_head(q, i));
}

/* ---- one turn: issue what may be issued, wait, take what is done ---- */

static bool next_operation(queue *q, operation *op)
{
    if (!q->has_pending) {
        if (q->ended || stop_word(q) || !generate(q, &q->pending)) {
            q->ended = true;
            return false;
        }
        q->has_pending = true;
    }
    if (q->config->verify && overlaps_in_flight(q, &q->pending)) {
        return false;
    }
    *op = q->pending;
    q->has_pending = false;
    return true;
}

static bool flush_due(const queue *q)
{
    if (q->phase != LG_RUN) {
        return false;
    }
    return (q->config->flush_every && q->unflushed >= q->config->flush_every) || (q->ended && !q->has_pending && !q->flushed_at_end);
}

/* As fio does it: nothing else in flight, the flush alone, and nothing beside it. */
static void issue_flush(queue *q)
{
    operation op = {.kind = LG_FLUSH};

    issue(q, &op);
    q->flushing = true;
    q->unflushed = 0;
    q->flushed_at_end |= q->ended && !q->has_pending;
}

static void issue_what_may_be(queue *q)
{
    operation op;

    while (q->idle_count > 0 && !q->flushing) {
        if (flush_due(q)) {
            if (q->in_flight == 0) {
                issue_flush(q);
            }
            return;
        }
        if (!next_operation(q, &op)) {
            if (q->in_flight == 0 && flush_due(q)) {
                issue_flush(q);
            }
            return;
        }
        q->unflushed += op.kind != LG_READ;
        issue(q, &op);
    }
}

static void kick(queue *q)
{
    uint64_t one = 1;

    if (ring_publish(&q->ring)) {
        q->result.kicks++;
        if (write(q->at.kick_fd, &one, sizeof one) != sizeof one && errno != EAGAIN) {
            fail(q, "kick: %s", strerror(errno));
        }
    }
}

static void give_up_if_late(queue *q, uint64_t since_ns)
{
    if (now() - since_ns > q->config->timeout_ns) {
        fail(q, "the server has completed nothing for %.1f s (queue %u, %u requests in flight)", (double)q->config->timeout_ns / 1e9,
             q->index, q->in_flight);
    }
}

static void spin(queue *q)
{
    while (!ring_completed(&q->ring)) {
        for (int i = 0; i < SPINS_PER_LOOK && !ring_completed(&q->ring); i++) {
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
        }
        if (stop_word(q) == 2) {
            return;
        }
        give_up_if_late(q, q->now_ns);
    }
}

static void sleep_on_call(queue *q)
{
    struct pollfd p = {.fd = q->at.call_fd, .events = POLLIN};
    uint64_t calls;

    while (!ring_completed(&q->ring)) {
        ring_interrupts(&q->ring, true);
        if (ring_completed(&q->ring)) {
            break;
        }
        if (poll(&p, 1, SLEEP_SLICE_MS) > 0 && read(q->at.call_fd, &calls, sizeof calls) == sizeof calls) {
            q->result.interrupts++;
        }
        if (stop_word(q) == 2) {
            break;
        }
        give_up_if_late(q, q->now_ns);
    }
    if (!q->config->event_idx) {
        ring_interrupts(&q->ring, false);
    }
}

/* The slot whose chain begins at `head`, or `depth` if there is none. */
static uint32_t slot_of(const queue *q, uint32_t head)
{
    uint32_t i = q->config->indirect ? head : head / q->chain;

    return i < q->config->depth && slot_head(q, i) == head ? i : q->config->depth;
}

static void settle(queue *q, uint32_t i)
{
    slot *s = &q->slots[i];
    uint8_t status = __atomic_load_n(&q->lines[i].status, __ATOMIC_RELAXED);
    bool flush = s->op.kind == LG_FLUSH;

    s->active = false;
    q->idle[q->idle_count++] = (uint16_t)i;
    q->in_flight--;
    if (status != VIRTIO_BLK_S_OK) {
        const char *meaning = status == VIRTIO_BLK_S_IOERR    ? "I/O error"
                              : status == VIRTIO_BLK_S_UNSUPP ? "unsupported"
                              : status == NO_STATUS           ? "completed without a status"
                                                              : "a status that does not exist";

        if (flush) {
            fail(q, "flush failed: %s (status %u)", meaning, status);
        } else {
            fail(q, "%s of %u bytes at offset %" PRIu64 " failed: %s (status %u)", kind_name(s->op.kind), q->config->block_bytes,
                 disk_offset(q, s->op.block), meaning, status);
        }
        return;
    }
    count(q, s->op.kind, flush ? 0 : q->config->block_bytes, q->now_ns - s->started_ns);
    if (flush) {
        q->flushing = false;
    } else if (q->config->verify && s->op.kind == LG_READ) {
        check_payload(q, &s->op, slot_payload(q, i));
    } else if (q->config->verify) {
        expect_acked(q, &s->op);
    }
}

static void take_completions(queue *q)
{
    uint16_t n = ring_completed(&q->ring);

    if (n > q->in_flight) {
        fail(q, "the server broke the used ring of queue %u: %u completions for %u requests in flight", q->index, n, q->in_flight);
        return;
    }
    q->now_ns = now();
    while (n-- > 0) {
        uint32_t head = ring_take(&q->ring), i = slot_of(q, head);

        if (i == q->config->depth || !q->slots[i].active) {
            fail(q, "the server broke the used ring of queue %u: it completed descriptor %u, which is not in flight", q->index, head);
            return;
        }
        settle(q, i);
    }
}

static void drive(queue *q)
{
    while (stop_word(q) != 2) {
        issue_what_may_be(q);
        if (q->in_flight == 0) {
            break;
        }
        if (q->config->poll) {
            ring_interrupts(&q->ring, false);
        }
        kick(q);
        if (q->config->poll) {
            spin(q);
        } else {
            sleep_on_call(q);
        }
        if (stop_word(q) != 2) {
            take_completions(q);
        }
    }
    if (q->in_flight > 0 && !q->result.error[0] && q->job->why[0]) {
        fail(q, "%s (queue %u, %u requests in flight)", q->job->why, q->index, q->in_flight);
    }
}

static void replay(queue *q)
{
    operation op;

    while (generate(q, &op)) {
        if (op.kind != LG_READ) {
            expect_issued(q, &op);
            expect_acked(q, &op);
        }
    }
}

/* ---- the job ---- */

static void pin(const queue *q)
{
    cpu_set_t set;

    if (q->at.cpu >= 0) {
        CPU_ZERO(&set);
        CPU_SET((unsigned)q->at.cpu, &set);
        pthread_setaffinity_np(pthread_self(), sizeof set, &set); /* best effort: Python has checked the number */
    }
}

static void *queue_main(void *argument)
{
    queue *q = argument;
    lg_job *job = q->job;
    uint64_t started_ns;

    pin(q);
    started_ns = q->now_ns = now();
    q->deadline_ns = q->config->runtime_ns && q->phase == LG_RUN ? started_ns + q->config->runtime_ns : NEVER;
    if (q->phase == LG_REPLAY) {
        replay(q);
    } else {
        drive(q);
    }
    q->result.runtime_ns = now() - started_ns;
    pthread_mutex_lock(&job->lock);
    job->running--;
    pthread_cond_broadcast(&job->ended);
    pthread_mutex_unlock(&job->lock);
    return NULL;
}

uint32_t lg_descriptors(const lg_config *config)
{
    uint32_t segments = (config->block_bytes + config->segment_bytes - 1) / config->segment_bytes;

    return config->indirect ? config->depth : config->depth * (segments + 2);
}

static uint32_t chain_length(const lg_config *config)
{
    return (config->block_bytes + config->segment_bytes - 1) / config->segment_bytes + 2;
}

void lg_measure(const lg_config *config, lg_layout *layout)
{
    uint64_t size = config->queue_size;

    layout->descriptors = 0;
    layout->available = layout->descriptors + size * sizeof(struct vring_desc);
    layout->used = align_up(layout->available + sizeof(struct vring_avail) + (size + 1) * 2, PAGE);
    layout->tables = align_up(layout->used + sizeof(struct vring_used) + size * sizeof(struct vring_used_elem) + 2, PAGE);
    layout->slots = layout->tables;
    if (config->indirect) {
        layout->slots += align_up((uint64_t)config->depth * chain_length(config) * sizeof(struct vring_desc), PAGE);
    }
    layout->payload = align_up(layout->slots + (uint64_t)config->depth * sizeof(slot_memory), PAGE);
    layout->bytes = layout->payload + config->depth * align_up(config->block_bytes, PAGE);
}

static bool set_up_queue(lg_job *job, uint32_t index, const lg_queue_config *at)
{
    queue *q = &job->queues[index];
    lg_layout layout;
    uint8_t *memory = job->memory + at->memory_offset;
    uint64_t state = job->config.seed + index;

    lg_measure(&job->config, &layout);
    *q = (queue){.job = job, .config = &job->config, .at = *at, .index = index, .chain = chain_length(&job->config)};
    assert(lg_descriptors(&job->config) <= job->config.queue_size);
    ring_init(&q->ring, job->config.queue_size, job->config.event_idx, memory + layout.descriptors, memory + layout.available,
              memory + layout.used);
    q->tables = memory + layout.tables;
    q->lines = (slot_memory *)(memory + layout.slots);
    q->payload = memory + layout.payload;
    q->payload_bytes = align_up(job->config.block_bytes, PAGE);
    q->slots = calloc(job->config.depth, sizeof *q->slots);
    q->idle = calloc(job->config.depth, sizeof *q->idle);
    if (!q->slots || !q->idle) {
        return false;
    }
    if (job->config.verify) {
        q->pieces = at->blocks * pieces_per_block(q);
        q->acked = calloc(2 * q->pieces + 1, sizeof *q->acked);
        if (!q->acked) {
            return false;
        }
        q->issued = q->acked + q->pieces;
    }
    for (uint32_t i = job->config.depth; i-- > 0;) {
        q->slots[i].laid_out = LG_KINDS;
        q->idle[q->idle_count++] = (uint16_t)i;
    }
    /* Data that does not compress, and no page that is first touched while we measure. */
    for (uint64_t i = 0; i < job->config.depth * q->payload_bytes; i += 8) {
        uint64_t word = random_next(&state);

        memcpy(q->payload + i, &word, 8);
    }
    return true;
}

lg_job *lg_new(const lg_config *config, const lg_queue_config *queues, uint8_t *memory)
{
    lg_job *job = calloc(1, sizeof *job);

    if (!job) {
        return NULL;
    }
    job->config = *config;
    job->memory = memory;
    pthread_mutex_init(&job->lock, NULL);
    pthread_cond_init(&job->ended, NULL);
    job->queues = calloc(config->queues, sizeof *job->queues);
    if (!job->queues) {
        lg_free(job);
        return NULL;
    }
    for (uint32_t i = 0; i < config->queues; i++) {
        if (!set_up_queue(job, i, &queues[i])) {
            lg_free(job);
            return NULL;
        }
    }
    return job;
}

static void join(lg_job *job)
{
    for (uint32_t i = 0; i < job->started; i++) {
        pthread_join(job->queues[i].thread, NULL);
    }
    job->started = 0;
}

void lg_free(lg_job *job)
{
    if (!job) {
        return;
    }
    if (job->started) {
        lg_stop(job, "abandoned");
        join(job);
    }
    for (uint32_t i = 0; job->queues && i < job->config.queues; i++) {
        free(job->queues[i].slots);
        free(job->queues[i].idle);
        free(job->queues[i].acked);
    }
    free(job->queues);
    pthread_cond_destroy(&job->ended);
    pthread_mutex_destroy(&job->lock);
    free(job);
}

int lg_start(lg_job *job, uint32_t phase)
{
    join(job);
    __atomic_store_n(&job->stop, 0, __ATOMIC_RELEASE);
    job->running = job->config.queues;
    for (uint32_t i = 0; i < job->config.queues; i++) {
        queue *q = &job->queues[i];

        assert(q->in_flight == 0);
        memset(&q->result, 0, sizeof q->result);
        q->completed = 0;
        reset_generator(q, phase);
    }
    for (uint32_t i = 0; i < job->config.queues; i++) {
        int error = pthread_create(&job->queues[i].thread, NULL, queue_main, &job->queues[i]);

        if (error) {
            pthread_mutex_lock(&job->lock);
            job->running -= job->config.queues - i;
            pthread_mutex_unlock(&job->lock);
            lg_stop(job, "a thread could not be started");
            join(job);
            return -error;
        }
        job->started = i + 1;
    }
    return 0;
}

uint32_t lg_wait(lg_job *job, uint32_t timeout_ms)
{
    struct timespec until;
    uint32_t running;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&job->lock);
    while (job->running > 0 && pthread_cond_timedwait(&job->ended, &job->lock, &until) == 0) {
    }
    running = job->running;
    pthread_mutex_unlock(&job->lock);
    if (running == 0) {
        join(job);
    }
    return running;
}

void lg_stop(lg_job *job, const char *why)
{
    if (why) {
        snprintf(job->why, sizeof job->why, "%s", why);
    }
    __atomic_store_n(&job->stop, why ? 2 : 1, __ATOMIC_RELEASE);
}

uint64_t lg_progress(lg_job *job)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < job->config.queues; i++) {
        sum += __atomic_load_n(&job->queues[i].completed, __ATOMIC_RELAXED);
    }
    return sum;
}

const lg_result *lg_get_result(lg_job *job, uint32_t index)
{
    return &job->queues[index].result;
}

uint32_t *lg_expected(lg_job *job, uint32_t index, uint64_t *pieces)
{
    *pieces = job->queues[index].pieces;
    return job->queues[index].acked;
}
