/* A wrapper that fails: which I/O is chosen by its kind, its place, its number, by chance, in a window of time or while a file exists.
 * What is chosen fails with an errno without having been done, or after a part of it has been written (torn), or it hangs: nothing is
 * heard of it until its time is over or the volume stops.
 *
 * Owns the I/O that has been chosen. An error is given from tick(), never from within submit(): so a queue of I/O that all fails does
 * not pile up on the stack. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "backend_wrap.h"

#define LOOK_NS 10000000ull /* how often it is looked whether what hangs may go on */

struct fault {
    uint32_t kinds;
    int32_t error;
    uint64_t nth, seed, offset, size, after_ns, during_ns, torn, hang;
    double probability; /* below 0: none was given */
    char *while_exists;
    uint64_t opened_ns, seen; /* seen: I/O that everything but its number and chance has chosen */
    struct timers failing, hanging;
};

/* A write of which only a part is passed below: what it was, to be put back. io->word points here. */
struct torn {
    uint64_t bytes;
    uint32_t iov_count;
    uint64_t last_bytes; /* of the segment in which the part ends */
};

/* Is this a time in which something fails? */
static bool now(const struct fault *fault, uint64_t now_ns)
{
    uint64_t since_ns = now_ns - fault->opened_ns;
    if (since_ns < fault->after_ns || since_ns - fault->after_ns >= fault->during_ns)
        return false;
    return !fault->while_exists || access(fault->while_exists, F_OK) == 0;
}

static bool here(const struct fault *fault, const struct io *io)
{
    if (io->kind == IO_FLUSH) /* concerns everything: not chosen where a place was given */
        return !fault->offset && fault->size == UINT64_MAX;
    return io->offset + io->bytes > fault->offset && (io->offset < fault->offset || io->offset - fault->offset < fault->size);
}

static bool chosen(struct fault *fault, const struct io *io)
{
    if (!(fault->kinds & KIND_BIT(io->kind)) || !here(fault, io) || !now(fault, clock_ns()))
        return false;
    fault->seen++;
    if (fault->nth && fault->seen != fault->nth)
        return false;
    return fault->probability < 0 || (double)(wrap_random(&fault->seed) >> 11) * 0x1p-53 < fault->probability;
}

/* What hangs would hang for ever, and the volume with it. */
static bool released(const struct backend *backend)
{
    return backend->given_up || (backend->volume && backend->volume->stopping);
}

static void fail(struct backend *backend, struct io *io)
{
    struct fault *fault = backend->state;
    timers_add(&fault->failing, 0, io, -fault->error);
    backend_wake_at(backend, 0);
}

/* The first part is written, of a length between nothing and all but the last piece. */
static void tear(struct backend *backend, struct io *io)
{
    struct fault *fault = backend->state;
    uint64_t align = backend->facts.align_io_bytes > VBLK_SECTOR ? backend->facts.align_io_bytes : VBLK_SECTOR;
    uint64_t part = wrap_random_below(&fault->seed, (io->bytes + align - 1) / align) * align, left = part;
    if (!part) {
        fail(backend, io);
        return;
    }
    struct torn *torn = malloc(sizeof *torn);
    assert(torn);
    *torn = (struct torn){.bytes = io->bytes, .iov_count = io->iov_count};
    for (uint32_t i = io->iov_first; i < torn->iov_count && left; i++) {
        if (io->iov[i].iov_len >= left) {
            torn->last_bytes = io->iov[i].iov_len;
            io->iov[i].iov_len = left;
            io->iov_count = i + 1;
        }
        left -= io->iov[i].iov_len;
    }
    io->bytes = part;
    io->word[backend->level] = (uintptr_t)torn;
    backend_pass(backend, io);
}

static void mend(struct io *io, uint64_t *word)
{
    struct torn *torn = (struct torn *)(uintptr_t)*word;
    if (torn->last_bytes)
        io->iov[io->iov_count - 1].iov_len = torn->last_bytes;
    io->iov_count = torn->iov_count;
    io->bytes = torn->bytes;
    *word = 0;
    free(torn);
}

static void fault_submit(struct backend *backend, struct io *io)
{
    struct fault *fault = backend->state;
    io->word[backend->level] = 0;
    if (!chosen(fault, io)) {
        backend_pass(backend, io);
    } else if (fault->hang && !released(backend)) {
        timers_add(&fault->hanging, 0, io, -fault->error);
        backend_wake_at(backend, clock_ns() + LOOK_NS);
    } else if (fault->torn && (io->kind == IO_WRITE || io->kind == IO_ZERO)) {
        tear(backend, io);
    } else {
        fail(backend, io);
    }
}

static void fault_ended(struct backend *backend, struct io *io, int32_t result)
{
    struct fault *fault = backend->state;
    uint64_t *word = &io->word[backend->level];
    if (*word) {
        mend(io, word);
        result = -fault->error;
    }
    backend_done(backend, io, result);
}

static uint64_t fault_tick(struct backend *backend, uint64_t now_ns)
{
    struct fault *fault = backend->state;
    struct waiting first;
    bool end = released(backend), over = fault->hanging.count && !now(fault, now_ns);
    while ((over || end) && timers_take(&fault->hanging, UINT64_MAX, &first)) {
        if (over)
            backend_pass(backend, first.io);
        else
            backend_done(backend, first.io, first.result);
    }
    while (timers_take(&fault->failing, UINT64_MAX, &first))
        backend_done(backend, first.io, first.result);
    return fault->hanging.count ? now_ns + LOOK_NS : UINT64_MAX;
}

static void fault_destroy(void *state)
{
    struct fault *fault = state;
    free(fault->failing.items);
    free(fault->hanging.items);
    free(fault->while_exists);
    free(fault);
}

static void fault_close(struct backend *backend)
{
    fault_destroy(backend->state);
}

static const struct backend_ops fault_ops = {.name = "fault", .submit = fault_submit, .ended = fault_ended, .tick = fault_tick, .abandon = wrap_abandon, .give_up = wrap_give_up, .close = fault_close};

static void *fault_make(const char *parameters, char *error, size_t error_bytes)
{
    struct fault asked = {.kinds = ALL_KINDS, .error = EIO, .size = UINT64_MAX, .during_ns = UINT64_MAX, .probability = -1};
    const struct parameter table[] = {
        {"kind", PARAMETER_KINDS, &asked.kinds, 0, 0},
        {"errno", PARAMETER_ERRNO, &asked.error, 0, 0},
        {"nth", PARAMETER_NUMBER, &asked.nth, 1, UINT64_MAX},
        {"probability", PARAMETER_FRACTION, &asked.probability, 0, 0},
        {"seed", PARAMETER_NUMBER, &asked.seed, 0, UINT64_MAX},
        {"offset", PARAMETER_NUMBER, &asked.offset, 0, INT64_MAX},
        {"size", PARAMETER_NUMBER, &asked.size, 1, INT64_MAX},
        {"after", PARAMETER_NUMBER, &asked.after_ns, 0, WRAP_MAX_NS},
        {"during", PARAMETER_NUMBER, &asked.during_ns, 0, WRAP_MAX_NS},
        {"while_exists", PARAMETER_TEXT, &asked.while_exists, 0, 0},
        {"torn", PARAMETER_NUMBER, &asked.torn, 0, 1},
        {"hang", PARAMETER_NUMBER, &asked.hang, 0, 1},
    };
    bool sound = wrap_parameters("fault", parameters, table, sizeof table / sizeof table[0], error, error_bytes);
    if (sound && asked.torn && asked.hang) {
        snprintf(error, error_bytes, "fault: what hangs cannot be torn too; allowed: torn=1 or hang=1");
        sound = false;
    }
    if (!sound) {
        free(asked.while_exists);
        return NULL;
    }
    asked.opened_ns = clock_ns();
    struct fault *fault = malloc(sizeof *fault);
    assert(fault);
    *fault = asked;
    return fault;
}

const struct wrapper wrapper_fault = {.ops = &fault_ops, .make = fault_make, .destroy = fault_destroy};
