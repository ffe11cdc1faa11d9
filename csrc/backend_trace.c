/* A wrapper that writes down every I/O, one line each, when it has ended: when it was begun (seconds since 1970), its kind, offset,
 * bytes, how many microseconds it took, and how it ended: `ok` or the name of the error. It lies where it is put in the stack: what
 * others above it hold or repeat it sees as it comes down.
 *
 * The loop never waits for the file: lines go into a ring, and a thread of its own writes them out. What the ring or the file has no
 * room for is dropped and counted, and a line that begins with # says how many. One producer (the loop) moves head, one consumer (the
 * thread) moves tail. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "backend_wrap.h"

#define RING_BYTES (1u << 20)
#define LINE_BYTES 160u
#define WRITE_OUT_NS 100000000ull /* at the latest after the first line that waits */

struct trace {
    int fd;
    uint64_t epoch_ns; /* the wall clock's time at 0 of the monotonic clock */
    char *ring;
    uint64_t head, tail; /* bytes since the beginning */
    uint64_t dropped;    /* lines since the last one that said so */
    uint64_t write_out_ns; /* when the thread is to be woken, or UINT64_MAX */
    bool stopping;
    sem_t work;
    pthread_t thread;
};

/* -- the thread -- */

static void write_out(struct trace *trace)
{
    uint64_t head = __atomic_load_n(&trace->head, __ATOMIC_ACQUIRE), tail = trace->tail;
    while (tail != head) {
        uint64_t at = tail % RING_BYTES, bytes = head - tail < RING_BYTES - at ? head - tail : RING_BYTES - at;
        ssize_t written = write(trace->fd, trace->ring + at, bytes);
        if (written < 0 && errno == EINTR)
            continue;
        tail += written > 0 ? (uint64_t)written : bytes; /* a file that is full loses them: nobody waits for a trace */
        __atomic_store_n(&trace->tail, tail, __ATOMIC_RELEASE);
    }
}

static void *work(void *argument)
{
    struct trace *trace = argument;
    bool stopping;
    do {
        while (sem_wait(&trace->work) < 0 && errno == EINTR)
            ;
        stopping = __atomic_load_n(&trace->stopping, __ATOMIC_ACQUIRE);
        write_out(trace);
    } while (!stopping);
    return NULL;
}

/* -- the loop -- */

static bool put(struct trace *trace, const char *line, uint32_t bytes)
{
    uint64_t tail = __atomic_load_n(&trace->tail, __ATOMIC_ACQUIRE), head = trace->head;
    if (RING_BYTES - (head - tail) < bytes)
        return false;
    uint64_t at = head % RING_BYTES, first = bytes < RING_BYTES - at ? bytes : RING_BYTES - at;
    memcpy(trace->ring + at, line, first);
    memcpy(trace->ring, line + first, bytes - first);
    __atomic_store_n(&trace->head, head + bytes, __ATOMIC_RELEASE);
    if (head - tail < RING_BYTES / 2 && head + bytes - tail >= RING_BYTES / 2)
        sem_post(&trace->work);
    return true;
}

static bool put_dropped(struct trace *trace)
{
    char line[LINE_BYTES];
    uint32_t bytes = (uint32_t)snprintf(line, sizeof line, "# %llu lines dropped\n", (unsigned long long)trace->dropped);
    return put(trace, line, bytes);
}

static void put_line(struct trace *trace, const struct io *io, uint64_t begun_ns, int32_t result, uint64_t now_ns)
{
    char line[LINE_BYTES];
    uint64_t at_ns = trace->epoch_ns + begun_ns, took_ns = now_ns - begun_ns;
    const char *name = result ? strerrorname_np(-result) : "ok";
    uint32_t bytes = (uint32_t)snprintf(line, sizeof line, "%llu.%06llu %s %llu %llu %llu.%llu %s\n", (unsigned long long)(at_ns / 1000000000),
                                        (unsigned long long)(at_ns % 1000000000 / 1000), wrap_kind_names[io->kind],
                                        (unsigned long long)io->offset, (unsigned long long)io->bytes,
                                        (unsigned long long)(took_ns / 1000), (unsigned long long)(took_ns % 1000 / 100), name ? name : "error");
    if (trace->dropped && put_dropped(trace))
        trace->dropped = 0;
    if (trace->dropped || !put(trace, line, bytes))
        trace->dropped++;
    else if (trace->write_out_ns == UINT64_MAX)
        trace->write_out_ns = now_ns + WRITE_OUT_NS;
}

static void trace_submit(struct backend *backend, struct io *io)
{
    io->word[backend->level] = clock_ns();
    backend_pass(backend, io);
}

static void trace_ended(struct backend *backend, struct io *io, int32_t result)
{
    struct trace *trace = backend->state;
    put_line(trace, io, io->word[backend->level], result, clock_ns());
    backend_wake_at(backend, trace->write_out_ns);
    backend_done(backend, io, result);
}

static uint64_t trace_tick(struct backend *backend, uint64_t now_ns)
{
    struct trace *trace = backend->state;
    if (now_ns >= trace->write_out_ns) {
        trace->write_out_ns = UINT64_MAX;
        sem_post(&trace->work);
    }
    return trace->write_out_ns;
}

static void trace_free(struct trace *trace)
{
    if (trace->fd >= 0)
        close(trace->fd);
    sem_destroy(&trace->work);
    free(trace->ring);
    free(trace);
}

static void trace_destroy(void *state)
{
    struct trace *trace = state;
    if (trace->dropped)
        put_dropped(trace);
    __atomic_store_n(&trace->stopping, true, __ATOMIC_RELEASE);
    sem_post(&trace->work);
    pthread_join(trace->thread, NULL);
    trace_free(trace);
}

static void trace_close(struct backend *backend)
{
    trace_destroy(backend->state);
}

static const struct backend_ops trace_ops = {.name = "trace", .submit = trace_submit, .ended = trace_ended, .tick = trace_tick, .close = trace_close};

/* A regular file only: a pipe's other end could make the thread, and so the end of the daemon, wait for ever. */
static int open_file(const char *path, char *error, size_t error_bytes)
{
    struct stat kind;
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0600);
    if (fd < 0) {
        snprintf(error, error_bytes, "trace: cannot write to '%.120s': %s", path, strerror(errno));
        return -1;
    }
    if (fstat(fd, &kind) == 0 && S_ISREG(kind.st_mode))
        return fd;
    snprintf(error, error_bytes, "trace: '%.120s' is not a regular file", path);
    close(fd);
    return -1;
}

static uint64_t wall_clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool start_thread(struct trace *trace)
{
    sigset_t all, before; /* signals are the main thread's */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int problem = pthread_create(&trace->thread, NULL, work, trace);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return !problem;
}

static void *trace_make(const char *parameters, char *error, size_t error_bytes)
{
    char *path = NULL;
    const struct parameter table[] = {{"file", PARAMETER_TEXT, &path, 0, 0}};
    if (!wrap_parameters("trace", parameters, table, sizeof table / sizeof table[0], error, error_bytes)) {
        free(path);
        return NULL;
    }
    if (!path) {
        snprintf(error, error_bytes, "trace: the parameter 'file' is missing");
        return NULL;
    }
    int fd = open_file(path, error, error_bytes);
    free(path);
    if (fd < 0)
        return NULL;
    struct trace *trace = calloc(1, sizeof *trace);
    assert(trace);
    trace->fd = fd;
    trace->epoch_ns = wall_clock_ns() - clock_ns();
    trace->write_out_ns = UINT64_MAX;
    trace->ring = malloc(RING_BYTES);
    sem_init(&trace->work, 0, 0);
    assert(trace->ring);
    if (!start_thread(trace)) {
        snprintf(error, error_bytes, "trace: cannot start a thread");
        trace_free(trace);
        return NULL;
    }
    return trace;
}

const struct wrapper wrapper_trace = {.ops = &trace_ops, .make = trace_make, .destroy = trace_destroy};
