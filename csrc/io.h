/* I/O on the backend and the cache file: what an operation of the core becomes, and the two drivers that can do it. */
#ifndef VHC_IO_H
#define VHC_IO_H

#include "backend.h"

#define IO_INLINE_IOV 8
#define IO_MAX_IOV 1024u /* the kernel's limit for one vectored call */

enum io_kind { IO_READ, IO_WRITE, IO_FLUSH, IO_ZERO };
/* Of a read of the log: what it brings is verified, and once read again. */
enum check { CHECK_NONE, CHECK_FIRST, CHECK_LAST };
enum zero_way { ZERO_PUNCH, ZERO_RANGE, ZERO_WRITE };

/* One I/O of the core. In the kernel it may be several calls, one after the other, when they are cut short. */
struct io {
    struct io *next; /* free list, write queue, a driver's list or a backend's */
    struct volume *volume; /* NULL: vhc_backend_sync_io() */
    const struct io_file *file; /* for the drivers */
    struct backend *at; /* which backend has it, or NULL */
    struct io *sibling; /* in request->direct_ios */
    struct request *request; /* a direct read's, else NULL */
    uint8_t kind;
    uint8_t target;    /* enum io_target */
    uint8_t check;
    uint8_t way;       /* of zeroing, as far as it has been tried */
    bool may_unmap;    /* of zeroing, what the core wants */
    bool abandoned;    /* its memory is not the request's any more: nothing is written there */
    bool remembered;   /* `whole` holds what was asked for */
    bool *sync_done;   /* of vhc_backend_sync_io() */
    bool background;   /* counts among the volume's writes in flight */
    bool durable;      /* a write of the log that ends when it is on the medium */
    uint16_t retries;
    uint32_t group;
    uint64_t offset, bytes; /* what is left */
    uint32_t iov_first, iov_count;
    struct iovec *iov; /* inline_iov or malloc */
    uint8_t *bounce;   /* memory that direct I/O can use, for a read that it cannot do in place */
    uint32_t bounce_skip, bounce_bytes; /* what the guest asked for, in it */
    uint32_t payload_offset;
    struct iovec *whole; /* once a transfer was cut short, and of a read that is checked: all of it, as it was at the start */
    uint32_t whole_count;
    uint64_t whole_offset, whole_bytes;
    uint64_t word[BACKEND_LEVELS]; /* each backend's own, by its level */
    int buffer; /* registered buffer that holds all of the single segment, or -1 */
    int32_t result; /* set by the driver, or of one that has ended while it was submitted */
    struct iovec inline_iov[IO_INLINE_IOV];
};

struct io_driver {
    /* NULL with one line in `error`: the kernel says no. */
    void *(*create)(vhc_engine *engine, char *error, size_t error_bytes);
    void (*destroy)(vhc_engine *engine);
    /* Tell the driver of a volume's slab, if that helps it. */
    void (*add_volume)(vhc_engine *engine, struct volume *volume);
    /* No I/O of it is in flight, and its slab goes. It may be told of the volume again. */
    void (*remove_volume)(vhc_engine *engine, struct volume *volume);
    /* And of a file: file->fixed. */
    void (*add_file)(vhc_engine *engine, struct io_file *file);
    void (*remove_file)(vhc_engine *engine, struct io_file *file);
    void (*submit)(vhc_engine *engine, struct io *io);
    /* Give the kernel all that has been submitted. */
    void (*flush)(vhc_engine *engine);
    /* Call io_ended() for what has ended. Returns how many. */
    uint32_t (*reap)(vhc_engine *engine);
    /* Completions wake (or no longer need to wake) epoll. After true, reap once more before sleeping. */
    void (*wake)(vhc_engine *engine, bool enabled);
    /* Block until something has ended. */
    void (*wait)(vhc_engine *engine);
};

extern const struct io_driver io_uring_driver, io_threads_driver;

bool io_create(vhc_engine *engine, char *error, size_t error_bytes);
void io_destroy(vhc_engine *engine);
/* io_ended() for what has ended, of the driver and of syncers. Returns how many. */
uint32_t io_reap(vhc_engine *engine);
void io_forget(vhc_engine *engine); /* when no backend has any I/O left */
/* For drivers and syncers: io->result is set. */
void io_ended(vhc_engine *engine, struct io *io);

/* For backends. By the driver, on io->file; backend_done() follows. */
void io_start(vhc_engine *engine, struct io *io);
/* Out of the top of the stack. */
void io_finish(vhc_engine *engine, struct io *io, int32_t result);
/* For vhc_backend_sync_io(): one that has memory of its own (io->bounce), with a copy of `data` in it. When it has ended, whoever set
 * io->sync_done frees it. */
struct io *io_new_sync(vhc_engine *engine, enum io_kind kind, uint64_t offset, uint64_t bytes, const void *data);
void io_free(vhc_engine *engine, struct io *io);
/* The front-end wants the memory of this request back: true if none of its I/O uses it any more. */
bool io_abandon(struct request *request);

/* For operations.c and log.c. Slots are consecutive blocks of the file's data, `skip` bytes into the first. */
void io_slots(struct volume *volume, enum io_target target, enum io_kind kind, uint32_t group, uint64_t offset, uint64_t bytes,
              const uint64_t *slots, uint32_t count, uint32_t skip);
/* Slots to whole blocks of the cache file. */
void io_record(struct volume *volume, uint32_t group, uint64_t offset, const uint64_t *slots, uint32_t count, bool durable);
#define IO_NO_GROUP UINT32_MAX /* a direct read that completes its request by itself */
void io_direct(struct request *request, enum io_target target, enum io_kind kind, uint32_t group, uint32_t payload_offset, uint64_t offset,
               uint64_t bytes);
void io_flush(struct volume *volume, enum io_target target, uint32_t group);
void io_superblock(struct volume *volume, uint32_t group, uint64_t offset, const uint8_t *block);
void io_zero(struct volume *volume, uint32_t group, uint64_t offset, uint64_t bytes, bool may_unmap);

#endif
