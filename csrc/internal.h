/* What the parts of the engine share: its objects, and who owns what.
 *
 *   engine ─┬─ volume ──┬─ slab, descriptors, groups              (volume.c, slab.c)
 *           │           ├─ RAM tier's entries, log's checksums    (tier.c, log.c)
 *           │           ├─ stack of backends                      (backend.c, backend_*.c, nbd_*.c)
 *           │           └─ connection ── queues, guest memory     (export.c, messages.c, memory.c, queue.c)
 *           ├─ requests, by tag                                   (request.c)
 *           ├─ I/O in flight, and the driver that does it         (io.c, io_uring.c, io_threads.c)
 *           └─ results of the turn                                (engine.c)
 *
 * One thread uses all of it. Nothing is global but the registry of guest mappings (sigbus.c). */
#ifndef VHC_INTERNAL_H
#define VHC_INTERNAL_H

#include <assert.h>
#include <stdbool.h>
#include <sys/uio.h>

#include "engine.h"
#include "libvhost-user.h"
#include "virtio_blk.h"

#define VHC_BLOCK 4096u
#define VHC_MAX_QUEUES 64
#define VHC_MAX_VOLUMES 4096
#define VHC_MAX_TAGS (1u << 24)
#define VHC_MAX_TURN_REQUESTS 4096  /* requests reported in a turn; the others wait in their rings */
#define VHC_MAX_VOLUME_REQUESTS 1024 /* of one volume in a turn, so that a busy volume does not starve the others */
#define ZEROES_BYTES (1u << 20)
#define VHC_INLINE_IOV 6            /* a 4 KiB request has three segments; longer chains get memory of their own */

struct volume;
struct connection;
struct io;
struct backend;

/* A growing array of results. */
#define VHC_VECTOR(type) \
    struct {             \
        type *items;     \
        uint32_t count, size; \
    }

struct queue {
    VuVirtq *vq; /* the ring itself, in libvhost-user's terms */
    uint16_t index;
    bool running;  /* started by the front-end and not stopped since */
    bool disabled; /* by SET_VRING_ENABLE */
    bool polled;   /* kicks are switched off, and the ring is looked at in every turn */
    bool pushed;   /* there are answers in the used ring of which the front-end has not been told */
    bool watched;  /* kick_fd is in the epoll set */
};

struct request {
    struct connection *connection;
    struct request *next; /* in the free list, or in connection->postponed */
    uint32_t tag;
    uint16_t queue, head;
    uint8_t kind;
    bool dropped;        /* by the core, while a direct read is still on its way into guest memory */
    uint32_t direct;     /* direct reads and writes in flight */
    struct io *direct_ios; /* those on the backend, by io->sibling */
    uint32_t sectors, writable_bytes; /* of device-writable memory: data and status */
    uint64_t sector;
    uint64_t popped_ns;
    uint32_t flags;
    uint32_t payload_bytes, payload_count;
    struct iovec *payload;
    uint8_t *status;
    struct iovec *chain; /* the whole chain, payload lies in it; inline_iov or malloc */
    struct iovec inline_iov[VHC_INLINE_IOV];
};

enum connection_state {
    CONNECTION_NONE,
    CONNECTION_ACTIVE,
    CONNECTION_CLOSING, /* waits until its requests are settled */
};

struct connection {
    VuDev dev;
    struct volume *volume;
    enum connection_state state;
    bool quiescing; /* pops nothing until all requests are settled, then goes on with the message held back, or leaves */
    bool may_drop;
    bool graceful; /* closing because vhc_volume_stop said so: answers are still given */
    bool quiesce_due; /* the core has still to be told */
    bool held;     /* a whole message is in `message`, and waits */
    uint64_t held_at_look; /* engine->looks when that began */
    bool wants_input; /* the socket is watched for input, else for its end only */
    volatile int bus_error; /* set by the SIGBUS handler */
    int reason;
    uint64_t generation;
    uint32_t outstanding;   /* requests that the core knows */
    uint32_t guest_io;      /* I/O in flight on guest memory */
    struct request *postponed; /* dropped by the core, but their queue goes on: reported again */
    uint64_t offered_features;
    uint8_t *log;
    uint64_t log_bytes;
    bool log_written;
    uint32_t inflight_queue_size;
    int reply_fd; /* to close when the answer has been sent, or -1 */
    bool resumed;  /* brings an in-flight area that has been used: the front-end may know the disk as smaller than it is */
    bool inflight_ours; /* the in-flight area was handed out to this front-end by us */
    VhostUserMsg message;
    uint32_t message_bytes; /* read so far, header included */
    struct queue queues[VHC_MAX_QUEUES];
    uint32_t running_queues, polled_queues;
};

struct group {
    uint32_t pending;
    int32_t result;
};

/* One entry of the RAM tier's ring, as it stands in the file. */
struct tier_entry {
    uint64_t seq, extent, slot;
};

struct tier {
    uint8_t *start; /* of the mapped file's header and entries, or NULL */
    size_t bytes;
    struct tier_entry *entries;
    uint64_t head, tail; /* counted since the file was made; ours, the file has copies */
    uint64_t seq;        /* of entries that VHC_OP_LOG1 makes */
};

struct log {
    uint32_t *crcs; /* one for each block of the ring, or NULL */
    uint32_t previous_crc; /* of the header composed last */
    struct syncer *syncer; /* syncer.h: does what has to be on the medium */
};

/* What I/O goes to. */
enum io_target { IO_BACKEND, IO_CACHE, IO_TARGETS };

/* A file as the drivers of io.h know it. */
struct io_file {
    int fd;    /* or -1 */
    int fixed; /* its index among the registered files, or -1 */
};

struct volume {
    vhc_engine *engine;
    uint32_t number;
    vhc_volume_config config;
    int listen_fd;
    bool started, stopping, listening;
    bool attached;     /* it has its storage; without that nothing is popped */
    bool on_hold;      /* nothing is popped meanwhile */
    bool handing_over; /* the core has been told that the front-end's last queue wants to stop in a migration */
    bool may_stop;     /* ... and lets it, though the storage stays */
    bool given_up;     /* queues stop as outside of a migration, until one starts */
    struct vblk_limits limits;
    uint8_t config_space[60];
    uint8_t *slab;
    int slab_fd;
    int buffer_base; /* first index among the registered buffers, or -1 */
    int kept_buffer_base; /* what the driver keeps for the next time that storage is attached, or -1 */
    struct backend *backend; /* the top of its stack */
    uint64_t size_bytes;
    uint32_t align_mem[IO_TARGETS], align_io[IO_TARGETS]; /* what each asks of addresses, and of offsets and lengths */
    struct io_file cache_file;
    struct tier tier;
    struct log log;
    struct group *groups;
    struct io *waiting_first, **waiting_last; /* background writes beyond write_depth */
    uint32_t writes_in_flight;
    uint64_t inflight_dev, inflight_ino; /* the last in-flight area seen */
    uint64_t connections;
    uint32_t bad_requests; /* in this turn */
    uint32_t next_queue;   /* where popping goes on, so that queues get turns */
    char message[200];
    struct connection connection;
    vhc_volume_stats stats;
};

struct io_driver; /* io.h */

struct vhc_engine {
    vhc_engine_config config;
    int epoll_fd;
    struct volume **volumes;
    uint32_t volumes_count;
    uint32_t next_volume;

    struct request **by_tag;
    uint32_t *free_tags;
    uint32_t tags, free_tags_count;
    struct request *free_requests;
    VHC_VECTOR(struct request *) request_chunks;

    const struct io_driver *driver;
    void *driver_state;
    struct io *free_ios;
    VHC_VECTOR(struct io *) io_chunks;
    struct syncs *syncs;    /* syncer.h */
    uint32_t ios_in_flight; /* given to the driver or to a syncer */
    uint32_t syncs_in_flight; /* of them, those that a thread works at, perhaps on our processor */
    uint32_t syncer_ios;      /* of them, those given to a syncer */
    uint32_t remote_ios;    /* given to servers */
    VHC_VECTOR(struct backend *) backends; /* by number; NULL: closed */
    struct backend *push_first;
    uint64_t backends_due_ns; /* the earliest tick */
    uint32_t submitting;      /* calls of submit() on the stack: an end is reported when they are over */
    bool ending;              /* nobody wants to hear of anything any more */
    struct io *ended_first, **ended_last;
    void *zeroes;           /* ZEROES_BYTES of them, for writing zeroes where fallocate cannot */

    uint64_t now_ns, epoll_ns, accept_retry_ns;
    uint64_t window_ns[2]; /* adaptive polling: for the guest, for I/O */
    uint32_t polled_queues;
    uint64_t looks; /* how often the rings have been looked at */
    bool again;     /* something waits for the next look */
    bool io_stalled; /* the kernel would not take all I/O: try again soon, even if nothing happens */

    VHC_VECTOR(uint32_t) group_volume, group_end;
    VHC_VECTOR(uint32_t) done_volume, done_group;
    VHC_VECTOR(int32_t) done_result;
    VHC_VECTOR(uint32_t) event_kind, event_volume;
    VHC_VECTOR(uint64_t) event_arg;
    uint32_t requests;
    uint32_t what[VHC_MAX_TURN_REQUESTS], tag[VHC_MAX_TURN_REQUESTS], sectors[VHC_MAX_TURN_REQUESTS];
    uint64_t sector[VHC_MAX_TURN_REQUESTS];
    vhc_engine_stats stats;
};

/* What epoll reports: kind in the top byte, volume or watch number in the low half, queue between. */
enum watch_kind { WATCH_LISTEN = 1, WATCH_SOCKET, WATCH_KICK, WATCH_DRIVER, WATCH_BACKEND, WATCH_OTHER };
#define WATCH(kind, queue, number) ((uint64_t)(kind) << 56 | (uint64_t)(queue) << 32 | (uint32_t)(number))

/* engine.c */
void engine_event(vhc_engine *engine, uint32_t kind, uint32_t volume, uint64_t arg);
void engine_done(vhc_engine *engine, uint32_t volume, uint32_t group, int32_t result);
void *engine_grow(void *items, uint32_t *size, size_t item_bytes);
uint64_t clock_ns(void);
bool watch_add(vhc_engine *engine, int fd, uint32_t events, uint64_t data);
bool watch_change(vhc_engine *engine, int fd, uint32_t events, uint64_t data);
void watch_remove(vhc_engine *engine, int fd);

/* operations.c */
void operations_run(vhc_engine *engine, const uint64_t *operations, uint32_t words);

/* poll.c */
void poll_turn(vhc_engine *engine, int64_t timeout_ns);
/* Nothing but backends, until *done. False: a signal has come first. */
bool poll_backends(vhc_engine *engine, const bool *done);

/* volume.c */
void volume_destroy(struct volume *volume);
void volume_listen(struct volume *volume, bool on);
void volume_accept(struct volume *volume);

/* export.c */
void connection_open(struct volume *volume, int fd);
void connection_input(struct connection *connection, uint32_t events);
/* The front-end has to go; its requests are settled first. reason: see VHC_EV_DISCONNECTED. */
void connection_close(struct connection *connection, int reason, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* Whatever became possible: finish a message held back, or the connection. */
void connection_progress(struct connection *connection);
void connection_abandon(struct connection *connection); /* the engine ends: nobody settles anything any more */
void connection_retire(struct connection *connection);
void connection_quiesce(struct connection *connection, bool may_drop);
static inline bool connection_settled(const struct connection *connection)
{
    return connection->outstanding == 0 && connection->guest_io == 0;
}
static inline bool connection_pops(const struct connection *connection)
{
    return connection->state == CONNECTION_ACTIVE && !connection->quiescing && connection->volume->attached && !connection->volume->on_hold;
}

/* messages.c */
/* Tell the front-end to read the configuration space again; false: it does not want to know, or cannot be told now. */
bool connection_config_changed(struct connection *connection);
enum verdict { VERDICT_PROCESS, VERDICT_LOOK, VERDICT_SETTLE, VERDICT_SETTLE_OR_DROP, VERDICT_HAND_OVER, VERDICT_BROKEN };
/* What has to happen before this message may be processed: nothing, another look at the rings, the end of all requests, or that the core
 * has let go of the storage besides. A broken one has closed the connection. */
enum verdict message_judge(struct connection *connection, const VhostUserMsg *message);
uint64_t device_features(const struct volume *volume);
int message_process(VuDev *dev, VhostUserMsg *message, int *do_reply);
extern const VuDevIface connection_interface;
bool fd_is_named_socket(int fd);

/* rings.c: messages that concern queues and the in-flight area */
void queue_stop(struct queue *queue, struct connection *connection);
bool queue_start(struct connection *connection, struct queue *queue);
bool queue_map(struct connection *connection, struct queue *queue);
bool inflight_create(struct connection *connection, VhostUserMsg *message);
bool inflight_adopt(struct connection *connection, const VhostUserMsg *message);

/* memory.c: guest memory and the dirty log */
bool memory_set_table(struct connection *connection, const VhostUserMsg *message);
bool memory_add(struct connection *connection, const VhostUserMsg *message);
bool memory_remove(struct connection *connection, const VhostUserMsg *message);
bool memory_set_log(struct connection *connection, const VhostUserMsg *message);
void memory_drop(struct connection *connection);
/* The address of guest-physical memory, and in *bytes how much of it lies there in one piece; NULL: nowhere. */
void *memory_translate(const struct connection *connection, uint64_t guest_address, uint64_t *bytes);
/* The address of `bytes` of the front-end's memory, all in one region, or NULL. */
void *memory_at(const struct connection *connection, uint64_t front_end_address, uint64_t bytes);
void memory_log_guest(struct connection *connection, uint64_t guest_address, uint64_t bytes);
void memory_log_host(struct connection *connection, const void *address, uint64_t bytes);
static inline bool memory_logs(const struct connection *connection)
{
    return connection->log && connection->dev.features & 1ull << VHOST_F_LOG_ALL;
}

/* queue.c: the rings */
uint32_t queue_pop_all(struct connection *connection, struct queue *queue, uint32_t limit);
bool queue_has_work(struct queue *queue);
void queue_push(struct connection *connection, struct queue *queue, uint16_t head, uint32_t written_bytes);
void queue_notify(struct connection *connection, struct queue *queue);
void queue_set_polled(struct connection *connection, struct queue *queue, bool polled);
void volume_notify(struct volume *volume);

/* request.c */
struct request *request_new(struct connection *connection, uint32_t segments);
void request_free(struct request *request);
void request_report(struct request *request);
struct request *request_by_tag(vhc_engine *engine, uint32_t tag);
void request_complete(struct request *request, uint8_t status);
void request_drop(struct request *request);
/* Drop the reads that the core has left to the engine: nobody else can. */
void requests_abandon(struct connection *connection);
void request_copy_in(const struct request *request, uint32_t offset, uint32_t bytes, uint8_t *target);
void request_copy_out(const struct request *request, uint32_t offset, uint32_t bytes, const uint8_t *source);
void histogram_add(uint64_t *histogram, uint64_t value);

/* slab.c */
bool slab_create(struct volume *volume, char *error, size_t error_bytes);
void slab_destroy(struct volume *volume);
static inline uint8_t *slab_slot(const struct volume *volume, uint32_t slot)
{
    return volume->slab + (size_t)slot * VHC_BLOCK;
}

/* tier.c */
bool tier_create(struct volume *volume, char *error, size_t error_bytes);
void tier_destroy(struct volume *volume);
void tier_publish(struct volume *volume, uint64_t seq, const uint64_t *pairs, uint32_t count);
void tier_publish_one(struct volume *volume, uint64_t block, uint32_t slot);
void tier_retire(struct volume *volume, uint64_t tail);

/* log.c */
#define LOG_MAX_SLOTS 2048u /* of a record: two header blocks, and no more payload than they have room for checksums */
struct log_record {
    uint64_t offset; /* in the cache file */
    uint32_t header_blocks, payload_blocks;
    const uint64_t *slots; /* the header's, then the payload's */
    uint32_t words_count;  /* 0: the header has been composed before */
    const uint64_t *words;
};
bool log_create(struct volume *volume, char *error, size_t error_bytes);
void log_destroy(struct volume *volume);
void log_write(struct volume *volume, uint32_t group, const struct log_record *record, bool repeat, bool durable);
void log_store(struct volume *volume, uint32_t group, uint64_t offset, const uint64_t *slots, uint32_t count);
void log_read(struct volume *volume, uint32_t group, uint64_t offset, const uint64_t *slots, uint32_t count);
void log_read_direct(struct request *request, uint32_t group, uint32_t payload_offset, uint64_t offset, uint64_t bytes);
void log_superblock(struct volume *volume, uint32_t group, uint64_t offset, const uint64_t *words, uint32_t count);
/* How many of the blocks that a read has brought have not the checksum that they should have. */
uint32_t log_wrong_blocks(const struct io *io);

/* sigbus.c */
bool sigbus_watch(const void *start, size_t bytes, volatile int *flag);
void sigbus_forget(const void *start);
bool sigbus_install(void);

#endif
