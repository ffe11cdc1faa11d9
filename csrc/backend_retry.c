/* A wrapper that tries again what failed for a reason that passes: an error of the link or of the medium, not of the request. What
 * has no room, is read-only or forbidden comes back at once: time does not mend it.
 *
 * A failed flush is never repeated here. What was written before it may be lost already, and a second flush that succeeds would hide
 * that: whoever knows what was written has to write it again. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "backend_wrap.h"

struct retry {
    uint32_t kinds;
    uint64_t attempts, first_ns, max_ns;
    struct timers waiting;
};

static bool passes(int32_t result)
{
    switch (-result) {
    case EIO:
    case EREMOTEIO:
    case EAGAIN:
    case EINTR:
    case EBUSY:
    case ENOMEM:
    case ENOBUFS:
    case ENOLINK:
    case ESTALE:
    case ETIMEDOUT:
    case EPIPE:
    case ENOTCONN:
    case ESHUTDOWN:
    case ECONNRESET:
    case ECONNABORTED:
    case ECONNREFUSED:
    case ENETDOWN:
    case ENETUNREACH:
    case ENETRESET:
    case EHOSTDOWN:
    case EHOSTUNREACH:
        return true;
    default:
        return false;
    }
}

static uint64_t pause_ns(const struct retry *retry, uint64_t made)
{
    uint64_t ns = retry->first_ns;
    while (--made && ns < retry->max_ns)
        ns *= 2;
    return ns < retry->max_ns ? ns : retry->max_ns;
}

/* io->word: how often it has been tried. */
static void retry_submit(struct backend *backend, struct io *io)
{
    io->word[backend->level] = 0;
    backend_pass(backend, io);
}

static void retry_ended(struct backend *backend, struct io *io, int32_t result)
{
    struct retry *retry = backend->state;
    uint64_t made = ++io->word[backend->level];
    if (!result || !passes(result) || !(retry->kinds & KIND_BIT(io->kind)) || made >= retry->attempts || backend->given_up) {
        backend_done(backend, io, result);
    } else {
        timers_add(&retry->waiting, clock_ns() + pause_ns(retry, made), io, result);
        backend_wake_at(backend, timers_next(&retry->waiting));
    }
}

static uint64_t retry_tick(struct backend *backend, uint64_t now_ns)
{
    struct retry *retry = backend->state;
    struct waiting first;
    while (timers_take(&retry->waiting, backend->given_up ? UINT64_MAX : now_ns, &first)) {
        if (backend->given_up)
            backend_done(backend, first.io, first.result);
        else
            backend_pass(backend, first.io);
    }
    return timers_next(&retry->waiting);
}

static void retry_destroy(void *state)
{
    struct retry *retry = state;
    free(retry->waiting.items);
    free(retry);
}

static void retry_close(struct backend *backend)
{
    retry_destroy(backend->state);
}

static const struct backend_ops retry_ops = {.name = "retry", .submit = retry_submit, .ended = retry_ended, .tick = retry_tick, .abandon = wrap_abandon, .give_up = wrap_give_up, .close = retry_close};

static void *retry_make(const char *parameters, char *error, size_t error_bytes)
{
    struct retry asked = {.kinds = ALL_KINDS & ~KIND_BIT(IO_FLUSH), .attempts = 10, .first_ns = 100000000, .max_ns = 5000000000};
    const struct parameter table[] = {
        {"kind", PARAMETER_KINDS, &asked.kinds, 0, 0},
        {"attempts", PARAMETER_NUMBER, &asked.attempts, 1, UINT32_MAX},
        {"first", PARAMETER_NUMBER, &asked.first_ns, 0, WRAP_MAX_NS},
        {"max", PARAMETER_NUMBER, &asked.max_ns, 0, WRAP_MAX_NS},
    };
    if (!wrap_parameters("retry", parameters, table, sizeof table / sizeof table[0], error, error_bytes))
        return NULL;
    if (asked.kinds & KIND_BIT(IO_FLUSH)) {
        snprintf(error, error_bytes, "retry: a flush that failed cannot be repeated: what was written before it may be lost; allowed: read, write, zero");
        return NULL;
    }
    struct retry *retry = malloc(sizeof *retry);
    assert(retry);
    *retry = asked;
    return retry;
}

const struct wrapper wrapper_retry = {.ops = &retry_ops, .make = retry_make, .destroy = retry_destroy};
