/* A wrapper that is slow: each I/O reaches what lies below after a time of its own kind, and at most so many bytes a second.
 *
 * Owns the I/O that waits. What is due first goes first, so with a jitter I/O overtakes I/O: no order was promised. */
#include <errno.h>
#include <stdlib.h>

#include "backend_wrap.h"

struct delay {
    uint64_t ns[4], jitter_ns, seed, rate; /* rate: bytes a second of reads and writes together, 0: any */
    uint64_t link_free_ns;                 /* when what has been submitted has gone through, at that rate */
    struct timers waiting;
};

static uint64_t due(struct delay *delay, const struct io *io, uint64_t now_ns)
{
    uint64_t at_ns = now_ns;
    if (delay->rate && (io->kind == IO_READ || io->kind == IO_WRITE)) {
        uint64_t from_ns = delay->link_free_ns > now_ns ? delay->link_free_ns : now_ns;
        at_ns = delay->link_free_ns = from_ns + (uint64_t)((double)io->bytes * 1e9 / (double)delay->rate);
    }
    return at_ns + delay->ns[io->kind] + wrap_random_below(&delay->seed, delay->jitter_ns);
}

static void delay_submit(struct backend *backend, struct io *io)
{
    struct delay *delay = backend->state;
    uint64_t now_ns = clock_ns(), due_ns = due(delay, io, now_ns);
    if (due_ns <= now_ns || backend->given_up) {
        backend_pass(backend, io);
    } else {
        timers_add(&delay->waiting, due_ns, io, 0);
        backend_wake_at(backend, timers_next(&delay->waiting));
    }
}

static uint64_t delay_tick(struct backend *backend, uint64_t now_ns)
{
    struct delay *delay = backend->state;
    struct waiting first;
    while (timers_take(&delay->waiting, backend->given_up ? UINT64_MAX : now_ns, &first)) {
        if (backend->given_up)
            backend_done(backend, first.io, -ESHUTDOWN);
        else
            backend_pass(backend, first.io);
    }
    return timers_next(&delay->waiting);
}

static void delay_destroy(void *state)
{
    struct delay *delay = state;
    free(delay->waiting.items);
    free(delay);
}

static void delay_close(struct backend *backend)
{
    delay_destroy(backend->state);
}

static const struct backend_ops delay_ops = {.name = "delay", .submit = delay_submit, .tick = delay_tick, .abandon = wrap_abandon, .give_up = wrap_give_up, .close = delay_close};

static void *delay_make(const char *parameters, char *error, size_t error_bytes)
{
    struct delay asked = {0};
    const struct parameter table[] = {
        {"read", PARAMETER_NUMBER, &asked.ns[IO_READ], 0, WRAP_MAX_NS},
        {"write", PARAMETER_NUMBER, &asked.ns[IO_WRITE], 0, WRAP_MAX_NS},
        {"flush", PARAMETER_NUMBER, &asked.ns[IO_FLUSH], 0, WRAP_MAX_NS},
        {"zero", PARAMETER_NUMBER, &asked.ns[IO_ZERO], 0, WRAP_MAX_NS},
        {"jitter", PARAMETER_NUMBER, &asked.jitter_ns, 0, WRAP_MAX_NS},
        {"seed", PARAMETER_NUMBER, &asked.seed, 0, UINT64_MAX},
        {"rate", PARAMETER_NUMBER, &asked.rate, 1, UINT64_MAX},
    };
    if (!wrap_parameters("delay", parameters, table, sizeof table / sizeof table[0], error, error_bytes))
        return NULL;
    struct delay *delay = malloc(sizeof *delay);
    assert(delay);
    *delay = asked;
    return delay;
}

const struct wrapper wrapper_delay = {.ops = &delay_ops, .make = delay_make, .destroy = delay_destroy};
