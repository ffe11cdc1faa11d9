/* I/O by a few threads, where io_uring is forbidden (the seccomp filters of containers, the io_uring_disabled sysctl). They make
 * one system call after the other and touch nothing of the engine but the I/O that they have been given. */
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define THREADS 16

struct pool {
    pthread_mutex_t mutex;
    pthread_cond_t work, ended;
    struct io *first, **last; /* to do */
    struct io *done_first, **done_last;
    bool stopping, wake;
    volatile bool any_done; /* done_first, for a look without the lock */
    int event_fd;
    pthread_t threads[THREADS];
    unsigned running;
};

static int32_t perform(struct io *io)
{
    int fd = io->file->fd;
    struct iovec *iov = &io->iov[io->iov_first];
    int count = (int)(io->iov_count - io->iov_first);
    ssize_t result = -1;
    errno = EINVAL;
    switch (io->kind) {
    case IO_READ:
        result = preadv(fd, iov, count, (off_t)io->offset);
        break;
    case IO_WRITE:
        result = pwritev(fd, iov, count, (off_t)io->offset);
        break;
    case IO_FLUSH:
        result = fdatasync(fd);
        break;
    case IO_ZERO:
        if (io->way == ZERO_WRITE)
            result = pwritev(fd, iov, count, (off_t)io->offset);
        else
            result = fallocate(fd, FALLOC_FL_KEEP_SIZE | (io->way == ZERO_PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE),
                               (off_t)io->offset, (off_t)io->bytes);
        break;
    }
    return result < 0 ? -errno : (int32_t)result;
}

static void *work(void *argument)
{
    struct pool *pool = argument;
    uint64_t one = 1;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        while (!pool->first && !pool->stopping)
            pthread_cond_wait(&pool->work, &pool->mutex);
        if (!pool->first)
            break;
        struct io *io = pool->first;
        pool->first = io->next;
        if (!pool->first)
            pool->last = &pool->first;
        pthread_mutex_unlock(&pool->mutex);
        int32_t result = perform(io);
        pthread_mutex_lock(&pool->mutex);
        io->result = result;
        io->next = NULL;
        *pool->done_last = io;
        pool->done_last = &io->next;
        pool->any_done = true;
        pthread_cond_signal(&pool->ended);
        if (pool->wake && write(pool->event_fd, &one, sizeof one) < 0)
            continue; /* full: it is signalled */
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

static void stop_threads(struct pool *pool)
{
    pthread_mutex_lock(&pool->mutex);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    while (pool->running)
        pthread_join(pool->threads[--pool->running], NULL);
}

static void pool_free(struct pool *pool)
{
    stop_threads(pool);
    if (pool->event_fd >= 0)
        close(pool->event_fd);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->ended);
    pthread_mutex_destroy(&pool->mutex);
    free(pool);
}

static void *pool_create(vhc_engine *engine, char *error, size_t error_bytes)
{
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool) {
        snprintf(error, error_bytes, "out of memory");
        return NULL;
    }
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->ended, NULL);
    pool->last = &pool->first;
    pool->done_last = &pool->done_first;
    pool->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int problem = pool->event_fd < 0 || !watch_add(engine, pool->event_fd, EPOLLIN | EPOLLET, WATCH(WATCH_DRIVER, 0, 0)) ? errno : 0;
    sigset_t all, before; /* signals are the main thread's */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (!problem && pool->running < THREADS) {
        problem = pthread_create(&pool->threads[pool->running], NULL, work, pool);
        pool->running += !problem;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (problem) {
        snprintf(error, error_bytes, "cannot start I/O threads: %s", strerror(problem));
        pool_free(pool);
        return NULL;
    }
    return pool;
}

static void pool_destroy(vhc_engine *engine)
{
    pool_free(engine->driver_state);
}

static void pool_add_volume(vhc_engine *engine, struct volume *volume)
{
    (void)engine, (void)volume;
}

static void pool_remove_volume(vhc_engine *engine, struct volume *volume)
{
    (void)engine, (void)volume;
}

static void pool_file(vhc_engine *engine, struct io_file *file)
{
    (void)engine;
    file->fixed = -1;
}

static void pool_submit(vhc_engine *engine, struct io *io)
{
    struct pool *pool = engine->driver_state;
    io->next = NULL;
    pthread_mutex_lock(&pool->mutex);
    *pool->last = io;
    pool->last = &io->next;
    pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
}

static void pool_flush(vhc_engine *engine)
{
    (void)engine;
}

static uint32_t pool_reap(vhc_engine *engine)
{
    struct pool *pool = engine->driver_state;
    uint32_t count = 0;
    if (!pool->any_done)
        return 0;
    pthread_mutex_lock(&pool->mutex);
    struct io *done = pool->done_first;
    pool->done_first = NULL;
    pool->done_last = &pool->done_first;
    pool->any_done = false;
    pthread_mutex_unlock(&pool->mutex);
    while (done) {
        struct io *io = done;
        done = io->next;
        io_ended(engine, io);
        count++;
    }
    return count;
}

static void pool_wake(vhc_engine *engine, bool enabled)
{
    struct pool *pool = engine->driver_state;
    pthread_mutex_lock(&pool->mutex);
    pool->wake = enabled;
    pthread_mutex_unlock(&pool->mutex);
}

static void pool_wait(vhc_engine *engine)
{
    struct pool *pool = engine->driver_state;
    pthread_mutex_lock(&pool->mutex);
    while (!pool->done_first)
        pthread_cond_wait(&pool->ended, &pool->mutex);
    pthread_mutex_unlock(&pool->mutex);
}

const struct io_driver io_threads_driver = {
    .create = pool_create,
    .destroy = pool_destroy,
    .add_volume = pool_add_volume,
    .remove_volume = pool_remove_volume,
    .add_file = pool_file,
    .remove_file = pool_file,
    .submit = pool_submit,
    .flush = pool_flush,
    .reap = pool_reap,
    .wake = pool_wake,
    .wait = pool_wait,
};
