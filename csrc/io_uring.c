/* I/O by io_uring. Completions are looked at in memory while the loop polls; an eventfd in the epoll set wakes it when it
 * sleeps. Buffers and files are registered when the kernel lets us: an unprivileged user may run into RLIMIT_MEMLOCK. */
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ENTRIES 1024u
#define COMPLETIONS 8192u
#define BUFFERS 16384u
#define BUFFER_BYTES (1ull << 30) /* the kernel's limit for one */
#define BATCH 64
#define FILES (2 * VHC_MAX_VOLUMES) /* a backend and a cache file each */

struct uring {
    struct io_uring ring;
    int event_fd;
    bool enabled, buffers, files;
    uint32_t buffers_used, files_used, free_files_count;
    int free_files[FILES];
    struct io *waiting_first, **waiting_last; /* beyond what the completion ring holds */
    uint32_t in_kernel;
};

static bool setup(struct uring *uring, int *problem)
{
    static const unsigned flags[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_R_DISABLED,
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_R_DISABLED,
        IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_R_DISABLED,
        IORING_SETUP_R_DISABLED,
    };
    for (unsigned i = 0; i < sizeof flags / sizeof flags[0]; i++) {
        struct io_uring_params params = {.flags = flags[i] | IORING_SETUP_CQSIZE, .cq_entries = COMPLETIONS};
        int result = io_uring_queue_init_params(ENTRIES, &uring->ring, &params);
        if (result == 0)
            return true;
        *problem = -result;
        if (result != -EINVAL)
            return false;
    }
    return false;
}

static void *uring_create(vhc_engine *engine, char *error, size_t error_bytes)
{
    struct uring *uring = calloc(1, sizeof *uring);
    int problem = ENOMEM;
    if (!uring || !setup(uring, &problem)) {
        snprintf(error, error_bytes, "io_uring is not available: %s", strerror(problem));
        free(uring);
        return NULL;
    }
    uring->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (uring->event_fd < 0 || io_uring_register_eventfd(&uring->ring, uring->event_fd) < 0 ||
        !watch_add(engine, uring->event_fd, EPOLLIN | EPOLLET, WATCH(WATCH_DRIVER, 0, 0))) {
        snprintf(error, error_bytes, "io_uring cannot signal: %s", strerror(errno));
        if (uring->event_fd >= 0)
            close(uring->event_fd);
        io_uring_queue_exit(&uring->ring);
        free(uring);
        return NULL;
    }
    fcntl(uring->ring.ring_fd, F_SETFD, FD_CLOEXEC);
    uring->buffers = io_uring_register_buffers_sparse(&uring->ring, BUFFERS) == 0;
    uring->files = io_uring_register_files_sparse(&uring->ring, FILES) == 0;
    uring->waiting_last = &uring->waiting_first;
    io_uring_cq_eventfd_toggle(&uring->ring, false);
    engine->stats.io_uring = 1;
    return uring;
}

static void uring_destroy(vhc_engine *engine)
{
    struct uring *uring = engine->driver_state;
    io_uring_queue_exit(&uring->ring);
    close(uring->event_fd);
    free(uring);
}

static void uring_add_file(vhc_engine *engine, struct io_file *file)
{
    struct uring *uring = engine->driver_state;
    int index = uring->free_files_count ? uring->free_files[uring->free_files_count - 1] : (int)uring->files_used;
    file->fixed = -1;
    if (file->fd < 0 || !uring->files || index >= FILES || io_uring_register_files_update(&uring->ring, (unsigned)index, &file->fd, 1) != 1)
        return;
    if (uring->free_files_count)
        uring->free_files_count--;
    else
        uring->files_used++;
    file->fixed = index;
}

static void uring_remove_file(vhc_engine *engine, struct io_file *file)
{
    struct uring *uring = engine->driver_state;
    int nothing = -1;
    if (file->fixed < 0)
        return;
    io_uring_register_files_update(&uring->ring, (unsigned)file->fixed, &nothing, 1); /* the ring would keep it open, and locked */
    uring->free_files[uring->free_files_count++] = file->fixed;
    file->fixed = -1;
}

static uint32_t pieces_of(const struct volume *volume)
{
    return (uint32_t)(((uint64_t)volume->config.slots * VHC_BLOCK + BUFFER_BYTES - 1) / BUFFER_BYTES);
}

static void uring_add_volume(vhc_engine *engine, struct volume *volume)
{
    struct uring *uring = engine->driver_state;
    uint64_t bytes = (uint64_t)volume->config.slots * VHC_BLOCK;
    uint32_t pieces = pieces_of(volume);
    uint32_t first = volume->kept_buffer_base >= 0 ? (uint32_t)volume->kept_buffer_base : uring->buffers_used;
    if (!uring->buffers || first + pieces > BUFFERS)
        return;
    for (uint32_t i = 0; i < pieces; i++) {
        uint64_t start = i * BUFFER_BYTES;
        struct iovec piece = {volume->slab + start, bytes - start < BUFFER_BYTES ? bytes - start : BUFFER_BYTES};
        __u64 no_tag = 0;
        if (io_uring_register_buffers_update_tag(&uring->ring, first + i, &piece, &no_tag, 1) != 1)
            return; /* pieces before it stay registered, unused */
    }
    if (volume->kept_buffer_base < 0)
        uring->buffers_used += pieces;
    volume->buffer_base = volume->kept_buffer_base = (int)first;
    engine->stats.registered_buffers += pieces;
}

/* The number of slots is the same the next time. */
static void uring_remove_volume(vhc_engine *engine, struct volume *volume)
{
    struct uring *uring = engine->driver_state;
    if (volume->buffer_base < 0)
        return;
    uint32_t pieces = pieces_of(volume);
    for (uint32_t i = 0; i < pieces; i++) {
        struct iovec piece = {NULL, 0};
        __u64 no_tag = 0;
        io_uring_register_buffers_update_tag(&uring->ring, (unsigned)volume->buffer_base + i, &piece, &no_tag, 1);
    }
    volume->buffer_base = -1;
    engine->stats.registered_buffers -= pieces;
}

static void prepare(struct io_uring_sqe *sqe, struct io *io)
{
    int fixed = io->file->fixed, fd = fixed >= 0 ? fixed : io->file->fd;
    struct iovec *iov = &io->iov[io->iov_first];
    uint32_t count = io->iov_count - io->iov_first;
    switch (io->kind) {
    case IO_READ:
        if (io->buffer >= 0)
            io_uring_prep_read_fixed(sqe, fd, iov->iov_base, (unsigned)iov->iov_len, io->offset, io->buffer);
        else if (count == 1)
            io_uring_prep_read(sqe, fd, iov->iov_base, (unsigned)iov->iov_len, io->offset);
        else
            io_uring_prep_readv(sqe, fd, iov, count, io->offset);
        break;
    case IO_WRITE:
        if (io->buffer >= 0)
            io_uring_prep_write_fixed(sqe, fd, iov->iov_base, (unsigned)iov->iov_len, io->offset, io->buffer);
        else if (count == 1)
            io_uring_prep_write(sqe, fd, iov->iov_base, (unsigned)iov->iov_len, io->offset);
        else
            io_uring_prep_writev(sqe, fd, iov, count, io->offset);
        break;
    case IO_FLUSH:
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
        break;
    case IO_ZERO:
        if (io->way == ZERO_WRITE)
            io_uring_prep_writev(sqe, fd, iov, count, io->offset);
        else
            io_uring_prep_fallocate(sqe, fd, FALLOC_FL_KEEP_SIZE | (io->way == ZERO_PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE),
                                    (off_t)io->offset, (off_t)io->bytes);
        break;
    }
    if (fixed >= 0)
        sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(sqe, io);
}

/* A device that gets everything of a turn at once stands still while the next turn is made: what a guest waits for goes out in pairs
 * (4 KiB random reads at depth 32: 70,000 a second instead of 57,000), background writes where batches save processor time. */
enum { FOREGROUND_BATCH = 2, BACKGROUND_BATCH = 16 };

static void enable(struct uring *uring)
{
    if (!uring->enabled) { /* by the thread that uses it, whichever made it */
        /* io_uring_enable_rings(), which liburing 2.3 declares and does not export */
        long result = syscall(__NR_io_uring_register, uring->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
        assert(result == 0);
        uring->enabled = true;
    }
}

static void uring_flush(vhc_engine *engine)
{
    struct uring *uring = engine->driver_state;
    engine->io_stalled = false;
    if (!io_uring_sq_ready(&uring->ring))
        return;
    enable(uring);
    /* The kernel stops at an entry that it refuses at once, and takes the rest when asked again. */
    while (io_uring_sq_ready(&uring->ring)) {
        int result = io_uring_submit(&uring->ring);
        assert(result >= 0 || result == -EBUSY || result == -EAGAIN || result == -EINTR || result == -ENOMEM);
        if (result <= 0 && result != -EINTR) {
            engine->io_stalled = true; /* it is short of something: later */
            break;
        }
    }
}

static void uring_submit(vhc_engine *engine, struct io *io)
{
    struct uring *uring = engine->driver_state;
    struct io_uring_sqe *sqe = NULL;
    if (uring->in_kernel < COMPLETIONS && !(sqe = io_uring_get_sqe(&uring->ring))) {
        uring_flush(engine);
        sqe = io_uring_get_sqe(&uring->ring);
    }
    if (!sqe) {
        io->next = NULL;
        *uring->waiting_last = io;
        uring->waiting_last = &io->next;
        return;
    }
    uring->in_kernel++;
    prepare(sqe, io);
    if (io_uring_sq_ready(&uring->ring) >= (io->background ? BACKGROUND_BATCH : FOREGROUND_BATCH))
        uring_flush(engine);
}

static void submit_waiting(vhc_engine *engine, struct uring *uring)
{
    uint32_t room = COMPLETIONS - uring->in_kernel;
    while (uring->waiting_first && room--) {
        struct io *io = uring->waiting_first;
        uring->waiting_first = io->next;
        if (!uring->waiting_first)
            uring->waiting_last = &uring->waiting_first;
        uring_submit(engine, io);
    }
}

static uint32_t uring_reap(vhc_engine *engine)
{
    struct uring *uring = engine->driver_state;
    struct io_uring_cqe *cqes[BATCH];
    uint32_t total = 0;
    if (!uring->enabled)
        return 0;
    while (total < COMPLETIONS) {
        struct io *ended[BATCH];
        unsigned count = io_uring_peek_batch_cqe(&uring->ring, cqes, BATCH);
        if (!count)
            break;
        for (unsigned i = 0; i < count; i++) {
            ended[i] = io_uring_cqe_get_data(cqes[i]);
            ended[i]->result = cqes[i]->res;
        }
        io_uring_cq_advance(&uring->ring, count);
        uring->in_kernel -= count;
        for (unsigned i = 0; i < count; i++)
            io_ended(engine, ended[i]);
        total += count;
    }
    if (uring->waiting_first)
        submit_waiting(engine, uring);
    return total;
}

static void uring_wake(vhc_engine *engine, bool enabled)
{
    struct uring *uring = engine->driver_state;
    io_uring_cq_eventfd_toggle(&uring->ring, enabled);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the kernel sees the flag before we look at the ring again */
}

static void uring_wait(vhc_engine *engine)
{
    struct uring *uring = engine->driver_state;
    struct io_uring_cqe *cqe;
    enable(uring);
    io_uring_submit_and_wait(&uring->ring, 1);
    io_uring_peek_cqe(&uring->ring, &cqe);
}

const struct io_driver io_uring_driver = {
    .create = uring_create,
    .destroy = uring_destroy,
    .add_volume = uring_add_volume,
    .remove_volume = uring_remove_volume,
    .add_file = uring_add_file,
    .remove_file = uring_remove_file,
    .submit = uring_submit,
    .flush = uring_flush,
    .reap = uring_reap,
    .wake = uring_wake,
    .wait = uring_wait,
};
