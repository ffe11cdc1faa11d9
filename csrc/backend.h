/* Backends: where a volume's data ends up, and the wrappers that stand before one.
 *
 * A volume has a stack of them. An I/O goes down from the top until one takes it, and its end comes back up the same way:
 *
 *     backend_submit() ─▶ wrapper ─backend_pass()─▶ wrapper ─backend_pass()─▶ file, nbd
 *      (choke point)   ◀──────────backend_done()────────────backend_done()────┘
 *
 * Each I/O that goes down to a backend comes back up from it exactly once, at once or later. In between it is that backend's:
 * io->at says whose. Nobody but its owner uses io->next and its own io->word[level]; everything that describes the I/O (kind, offset,
 * bytes, iov, may_unmap, abandoned) is the same when it ends as it was when it began, so that a wrapper may send it down once more.
 *
 * What a backend may rely on, because the choke point asserts it: the range lies within facts.size_bytes and is aligned as the facts ask;
 * the segments of iov are `bytes` long together and stay where they are until the end; a read-only backend is neither written nor
 * zeroed. What the core may rely on: one end for each I/O, and a result that is 0 or a negative errno.
 *
 * A flush covers the writes and zeroes whose end was reported before it was submitted, and no others. Zeroed ranges read as zeroes
 * afterwards. Of two I/Os in flight on the same range nothing is promised: the core never has them. */
#ifndef VHC_BACKEND_H
#define VHC_BACKEND_H

#include "internal.h"

#define BACKEND_LEVELS 8 /* of a stack, the lowest included */
#define BACKEND_NEVER UINT64_MAX

struct io;

struct backend_ops {
    const char *name;
    /* An I/O comes down. One backend_done() follows, now or later. */
    void (*submit)(struct backend *backend, struct io *io);
    /* One that this backend has passed below has ended there: result is 0 or a negative errno. NULL: it goes on up. */
    void (*ended)(struct backend *backend, struct io *io, int32_t result);
    /* After all submits of a look, if backend_wants_push() was called: give the kernel what has been gathered. */
    void (*push)(struct backend *backend);
    /* Do what is due, and say when there is more: CLOCK_MONOTONIC in ns, or BACKEND_NEVER. */
    uint64_t (*tick)(struct backend *backend, uint64_t now_ns);
    /* A descriptor watched by backend_watch() is ready. */
    void (*ready)(struct backend *backend, uint32_t index, uint32_t events);
    /* The front-end needs the memory of this read, which goes on: true if it is not touched any more from now on. NULL: ask below. */
    bool (*abandon)(struct backend *backend, struct io *io);
    /* The engine is about to end, or the backend: wait a moment for what is in flight. NULL: there is no need. */
    void (*drain)(struct backend *backend);
    /* Nothing is waited for any more: what it has ends soon, in error, and so does what comes. NULL: nothing ever waits here for long. */
    void (*give_up)(struct backend *backend);
    void (*read_stats)(struct backend *backend, vhc_backend_stats *stats);
    /* The engine has no I/O of it any more, or has given up what it has. Frees what `state` owns. */
    void (*close)(struct backend *backend);
};

/* One I/O, in pieces, that vhc_backend_sync_io() waits for. */
struct backend_sync {
    struct io *io; /* the piece in flight, or NULL */
    bool done;
    uint32_t kind;
    uint64_t offset, bytes, position;
    uint8_t *buffer;
};

struct backend {
    const struct backend_ops *ops;
    vhc_engine *engine;
    struct backend *below, *above;
    struct volume *volume; /* whose it is, or NULL: nobody's yet */
    struct backend *next_push;
    bool to_push;
    bool given_up; /* by wrap_give_up() */
    uint8_t level; /* 0: the lowest */
    uint32_t number; /* among the engine's */
    uint64_t due_ns; /* of tick() */
    vhc_backend_facts facts;
    struct backend_sync sync;
    char message[200]; /* to the last VHC_EV_BACKEND */
    void *state;
};

/* The choke point: what the core wants of its volume's backend. */
void backend_submit(struct volume *volume, struct io *io);
/* For wrappers: to the backend below. */
void backend_pass(struct backend *backend, struct io *io);
/* For every backend: an I/O that came down to it has ended. */
void backend_done(struct backend *backend, struct io *io, int32_t result);

/* For implementations. NULL with one line in `error`. The new backend stands on `below` (NULL: on nothing) and has its facts. */
struct backend *backend_new(vhc_engine *engine, const struct backend_ops *ops, struct backend *below, char *error, size_t error_bytes);
bool backend_facts_sound(const vhc_backend_facts *facts, char *error, size_t error_bytes);
/* tick() has to be called at this time, or before. */
void backend_wake_at(struct backend *backend, uint64_t due_ns);
void backend_wants_push(struct backend *backend);
bool backend_watch(struct backend *backend, uint32_t index, int fd, uint32_t events);
void backend_watch_again(struct backend *backend, uint32_t index, int fd, uint32_t events); /* other events */
/* Tell the core, with one line for people: VHC_BACKEND_CONNECTED and so on. */
void backend_event(struct backend *backend, uint64_t what, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* For the engine. */
void backends_push(vhc_engine *engine);
void backends_look(vhc_engine *engine); /* timers, and what has ended while it was submitted */
void backends_ready(vhc_engine *engine, uint32_t number, uint32_t index, uint32_t events);
void backends_drain(vhc_engine *engine);
void backends_destroy(vhc_engine *engine);
void backends_stop(struct volume *volume); /* it stops: what wrappers hold is let go */
/* True: the memory of this read is not touched any more. */
bool backend_abandon(struct io *io);
/* The stack below `top` becomes this volume's, and is nobody's again. */
bool backend_adopt(struct volume *volume, vhc_backend *top, char *error, size_t error_bytes);
void backend_release(struct volume *volume);
/* The disk is larger now, and what it lies on has been before. */
void backend_grown(struct volume *volume);

#endif
