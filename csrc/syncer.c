/* What has to be on the medium. A record that a guest's flush waits for is written and then synced by one thread: two calls that block,
 * and two switches of a processor's thread. By io_uring it is a write, whose end wakes the loop, and a fdatasync, which the kernel gives
 * to a worker: four switches, as long altogether as a good disk takes (QD1, a flush after each write: a third more of them a second).
 *
 * Each cache file has a thread of its own, so that a device that hangs holds up nobody else; the writer has at most two such calls in
 * flight. The threads touch nothing of the engine but the I/O that they have been given, and `struct syncs`. */
#include "syncer.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

/* What has ended, of all files. */
struct syncs {
    pthread_mutex_t mutex;
    pthread_cond_t ended;
    struct io *first, **last;
    bool any; /* `first`, for a look without the lock */
    int event_fd;
};

struct syncer {
    struct syncs *syncs;
    int fd;
    pthread_mutex_t mutex;
    pthread_cond_t work;
    struct io *first, **last; /* to do */
    bool stopping;
    pthread_t thread;
};

/* A write that is cut short is continued by io_ended(), and comes here again. */
static int32_t perform(int fd, const struct io *io)
{
    ssize_t written = 0;
    if (io->kind == IO_WRITE) {
        written = pwritev(fd, &io->iov[io->iov_first], (int)(io->iov_count - io->iov_first), (off_t)io->offset);
        if (written < 0)
            return -errno;
        if ((uint64_t)written < io->bytes)
            return (int32_t)written;
    }
    return fdatasync(fd) < 0 ? -errno : (int32_t)written;
}

static void *work(void *argument)
{
    struct syncer *syncer = argument;
    struct syncs *syncs = syncer->syncs;
    const uint64_t one = 1;
    pthread_mutex_lock(&syncer->mutex);
    for (;;) {
        while (!syncer->first && !syncer->stopping)
            pthread_cond_wait(&syncer->work, &syncer->mutex);
        struct io *io = syncer->first;
        if (!io)
            break;
        syncer->first = io->next;
        if (!syncer->first)
            syncer->last = &syncer->first;
        pthread_mutex_unlock(&syncer->mutex);
        io->result = perform(syncer->fd, io);
        io->next = NULL;
        pthread_mutex_lock(&syncs->mutex);
        *syncs->last = io;
        syncs->last = &io->next;
        __atomic_store_n(&syncs->any, true, __ATOMIC_RELEASE);
        pthread_cond_signal(&syncs->ended);
        pthread_mutex_unlock(&syncs->mutex);
        while (write(syncs->event_fd, &one, sizeof one) < 0 && errno == EINTR)
            ; /* full: it is signalled */
        pthread_mutex_lock(&syncer->mutex);
    }
    pthread_mutex_unlock(&syncer->mutex);
    return NULL;
}

struct syncer *syncer_create(vhc_engine *engine, int fd, char *error, size_t error_bytes)
{
    struct syncer *syncer = calloc(1, sizeof *syncer);
    int problem = ENOMEM;
    if (syncer) {
        syncer->syncs = engine->syncs;
        syncer->fd = fd;
        syncer->last = &syncer->first;
        pthread_mutex_init(&syncer->mutex, NULL);
        pthread_cond_init(&syncer->work, NULL);
        sigset_t all, before; /* signals are the main thread's */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        problem = pthread_create(&syncer->thread, NULL, work, syncer);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (!problem)
        return syncer;
    snprintf(error, error_bytes, "cannot start a thread for the cache file: %s", strerror(problem));
    free(syncer);
    return NULL;
}

void syncer_destroy(struct syncer *syncer)
{
    pthread_mutex_lock(&syncer->mutex);
    syncer->stopping = true;
    pthread_cond_signal(&syncer->work);
    pthread_mutex_unlock(&syncer->mutex);
    pthread_join(syncer->thread, NULL);
    pthread_cond_destroy(&syncer->work);
    pthread_mutex_destroy(&syncer->mutex);
    free(syncer);
}

void syncer_submit(struct syncer *syncer, struct io *io)
{
    io->next = NULL;
    pthread_mutex_lock(&syncer->mutex);
    *syncer->last = io;
    syncer->last = &io->next;
    pthread_mutex_unlock(&syncer->mutex);
    pthread_cond_signal(&syncer->work); /* now, so that it does not wake up to wait for the mutex */
}

bool syncs_create(vhc_engine *engine, char *error, size_t error_bytes)
{
    struct syncs *syncs = calloc(1, sizeof *syncs);
    int event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!syncs || event_fd < 0 || !watch_add(engine, event_fd, EPOLLIN | EPOLLET, WATCH(WATCH_DRIVER, 0, 0))) {
        snprintf(error, error_bytes, "cannot watch the threads of cache files: %s", strerror(errno));
        if (event_fd >= 0)
            close(event_fd);
        free(syncs);
        return false;
    }
    syncs->event_fd = event_fd;
    syncs->last = &syncs->first;
    pthread_mutex_init(&syncs->mutex, NULL);
    pthread_cond_init(&syncs->ended, NULL);
    engine->syncs = syncs;
    return true;
}

void syncs_destroy(vhc_engine *engine)
{
    struct syncs *syncs = engine->syncs;
    if (!syncs)
        return;
    close(syncs->event_fd);
    pthread_cond_destroy(&syncs->ended);
    pthread_mutex_destroy(&syncs->mutex);
    free(syncs);
    engine->syncs = NULL;
}

uint32_t syncs_reap(vhc_engine *engine)
{
    struct syncs *syncs = engine->syncs;
    uint32_t count = 0;
    if (!__atomic_load_n(&syncs->any, __ATOMIC_ACQUIRE))
        return 0;
    pthread_mutex_lock(&syncs->mutex);
    struct io *io = syncs->first;
    syncs->first = NULL;
    syncs->last = &syncs->first;
    syncs->any = false;
    pthread_mutex_unlock(&syncs->mutex);
    while (io) {
        struct io *ended = io;
        io = io->next;
        io_ended(engine, ended);
        count++;
    }
    return count;
}

void syncs_wait(vhc_engine *engine)
{
    struct syncs *syncs = engine->syncs;
    pthread_mutex_lock(&syncs->mutex);
    while (!syncs->first)
        pthread_cond_wait(&syncs->ended, &syncs->mutex);
    pthread_mutex_unlock(&syncs->mutex);
}
