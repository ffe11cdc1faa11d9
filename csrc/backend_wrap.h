/* What the wrappers share: their kinds, their parameters, an I/O's place in each of them, I/O that waits for its time. */
#ifndef VHC_BACKEND_WRAP_H
#define VHC_BACKEND_WRAP_H

#include "backend.h"
#include "io.h"

/* Delays and pauses are no longer than this: beyond it a number is a mistake of units. */
#define WRAP_MAX_NS (3600ull * 1000000000ull)

/* Kinds of I/O as a set. */
#define KIND_BIT(kind) (1u << (kind))
#define ALL_KINDS (KIND_BIT(IO_READ) | KIND_BIT(IO_WRITE) | KIND_BIT(IO_FLUSH) | KIND_BIT(IO_ZERO))
extern const char *const wrap_kind_names[4];

struct parameter {
    const char *name;
    enum { PARAMETER_NUMBER, PARAMETER_FRACTION, PARAMETER_TEXT, PARAMETER_KINDS, PARAMETER_ERRNO } type;
    void *value; /* uint64_t, double, char * (malloc), uint32_t (a set of kinds), int32_t */
    uint64_t least, most;
};
/* "name=value name=value"; durations are in nanoseconds. A backslash takes the next character as it is. False, with one line: a parameter that does not exist, comes
 * twice, or has a value that it cannot have. */
bool wrap_parameters(const char *wrapper, const char *text, const struct parameter *parameters, uint32_t count, char *error, size_t error_bytes);

/* For ops->give_up: tick() then ends what waits. */
void wrap_give_up(struct backend *backend);

/* For ops->abandon: what waits here goes nowhere near its memory. */
bool wrap_abandon(struct backend *backend, struct io *io);

/* Deterministic, so that a seed tells a run. */
uint64_t wrap_random(uint64_t *state);
/* 0 .. below - 1; 0 for 0. */
uint64_t wrap_random_below(uint64_t *state, uint64_t below);

/* I/O that waits, by time; what is due at the same time goes in the order in which it came. */
struct waiting {
    uint64_t due_ns, order;
    struct io *io;
    int32_t result; /* with which it will end, or that it ended with */
};
struct timers {
    struct waiting *items; /* a heap */
    uint32_t count, size;
    uint64_t order;
};
void timers_add(struct timers *timers, uint64_t due_ns, struct io *io, int32_t result);
/* The first, if it is due. */
bool timers_take(struct timers *timers, uint64_t now_ns, struct waiting *first);
static inline uint64_t timers_next(const struct timers *timers)
{
    return timers->count ? timers->items[0].due_ns : UINT64_MAX;
}

struct wrapper {
    const struct backend_ops *ops; /* its name is the wrapper's */
    void *(*make)(const char *parameters, char *error, size_t error_bytes); /* backend->state, or NULL with one line in `error` */
    void (*destroy)(void *state);
};
extern const struct wrapper wrapper_delay, wrapper_fault, wrapper_retry, wrapper_trace;

#endif
