/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The limit: a vhost-user-blk back-end on bare libvhost-user that completes every request at once. With --copy it also moves the
 * payload to and from memory, as any cache has to. One thread serves all queues and polls as long as that pays. It trusts its
 * front-end: it is for measuring only. */
#include <errno.h>
#include <getopt.h>
#include <libvhost-user.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_QUEUES 64
#define SECTOR 512u
#define ROUNDS_PER_LOOK 1024 /* polling rounds between two looks at the socket */
#define SHORTEST_POLL_NS 4000

static struct {
    VuDev dev;
    bool connected, copy;
    bool started[MAX_QUEUES];
    int queues, epoll;
    uint64_t size;
    uint8_t *memory;
    int64_t poll_max_ns, poll_ns;
} back = {.queues = 4, .size = 128u << 20, .poll_max_ns = 50000};

static int64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

static void die(const char *what)
{
    fprintf(stderr, "null-backend: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* ---- what libvhost-user asks of us ---- */

static void on_panic(VuDev *dev, const char *message)
{
    fprintf(stderr, "null-backend: %s\n", message);
    back.connected = false;
}

static void set_watch(VuDev *dev, int fd, int condition, vu_watch_cb callback, void *data)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};

    if (epoll_ctl(back.epoll, EPOLL_CTL_ADD, fd, &event) && errno != EEXIST) {
        die("epoll_ctl");
    }
}

static void remove_watch(VuDev *dev, int fd)
{
    epoll_ctl(back.epoll, EPOLL_CTL_DEL, fd, NULL);
}

static uint64_t get_features(VuDev *dev)
{
    return 1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_BLK_SIZE | 1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_BLK_F_CONFIG_WCE |
           1ull << VIRTIO_BLK_F_MQ | 1ull << VIRTIO_BLK_F_DISCARD | 1ull << VIRTIO_BLK_F_WRITE_ZEROES;
}

static uint64_t get_protocol_features(VuDev *dev)
{
    return 0;
}

static int get_config(VuDev *dev, uint8_t *space, uint32_t bytes)
{
    struct virtio_blk_config config = {
        .capacity = back.size / SECTOR,
        .seg_max = 126,
        .blk_size = SECTOR,
        .wce = 1,
        .num_queues = (uint16_t)back.queues,
        .max_discard_sectors = 1u << 20,
        .max_discard_seg = 1,
        .discard_sector_alignment = 1,
        .max_write_zeroes_sectors = 1u << 20,
        .max_write_zeroes_seg = 1,
    };

    memset(space, 0, bytes);
    memcpy(space, &config, bytes < sizeof config ? bytes : sizeof config);
    return 0;
}

static int set_config(VuDev *dev, const uint8_t *data, uint32_t offset, uint32_t size, uint32_t flags)
{
    return 0;
}

/* The library takes the end of the connection for a message, and would exit. */
static int process_message(VuDev *dev, VhostUserMsg *message, int *reply)
{
    *reply = 0;
    if (message->request == VHOST_USER_NONE) {
        back.connected = false;
        return 1;
    }
    return 0;
}

static void on_kick(VuDev *dev, int index)
{
}

static void set_started(VuDev *dev, int index, bool started)
{
    back.started[index] = started;
    vu_set_queue_handler(dev, vu_get_queue(dev, index), started ? on_kick : NULL);
}

static const VuDevIface interface = {
    .get_features = get_features,
    .get_protocol_features = get_protocol_features,
    .process_msg = process_message,
    .queue_set_started = set_started,
    .get_config = get_config,
    .set_config = set_config,
};

/* ---- requests ---- */

static uint32_t copy_payload(const struct virtio_blk_outhdr *header, const VuVirtqElement *e)
{
    bool in = header->type == VIRTIO_BLK_T_IN;
    const struct iovec *segments = in ? e->in_sg : e->out_sg + 1;
    unsigned count = in ? e->in_num - 1 : e->out_num - 1;
    uint64_t at = header->sector * SECTOR;
    uint32_t moved = 0;

    for (unsigned i = 0; i < count; i++) {
        size_t bytes = segments[i].iov_len;

        if (at > back.size || bytes > back.size - at) {
            break;
        }
        if (back.copy && in) {
            memcpy(segments[i].iov_base, back.memory + at, bytes);
        } else if (back.copy) {
            memcpy(back.memory + at, segments[i].iov_base, bytes);
        }
        at += bytes;
        moved += in ? (uint32_t)bytes : 0;
    }
    return moved;
}

/* True if there was anything to do. */
static bool serve(VuDev *dev, int index)
{
    VuVirtq *queue = vu_get_queue(dev, index);
    VuVirtqElement *e;
    bool any = false;

    while ((e = vu_queue_pop(dev, queue, sizeof *e))) {
        uint32_t used = 1;

        if (e->out_num >= 1 && e->in_num >= 1 && e->out_sg[0].iov_len >= sizeof(struct virtio_blk_outhdr)) {
            const struct virtio_blk_outhdr *header = e->out_sg[0].iov_base;

            if (header->type == VIRTIO_BLK_T_IN || header->type == VIRTIO_BLK_T_OUT) {
                used += copy_payload(header, e);
            }
            *(uint8_t *)e->in_sg[e->in_num - 1].iov_base = VIRTIO_BLK_S_OK;
        }
        vu_queue_push(dev, queue, e, used);
        free(e);
        any = true;
    }
    if (any) {
        vu_queue_notify(dev, queue);
    }
    return any;
}

static bool serve_all(VuDev *dev)
{
    bool any = false;

    for (int i = 0; i < back.queues; i++) {
        if (back.started[i]) {
            any |= serve(dev, i);
        }
    }
    return any;
}

static void want_kicks(VuDev *dev, int wanted)
{
    for (int i = 0; i < back.queues; i++) {
        if (back.started[i]) {
            vu_queue_set_notification(dev, vu_get_queue(dev, i), wanted);
        }
    }
}

/* ---- the loop ---- */

static void look(VuDev *dev, int timeout_ms)
{
    struct epoll_event events[16];
    int n = epoll_wait(back.epoll, events, 16, timeout_ms);
    eventfd_t kicks;

    for (int i = 0; i < n && back.connected; i++) {
        if (events[i].data.fd == dev->sock) {
            if (!vu_dispatch(dev)) {
                back.connected = false;
            }
        } else {
            eventfd_read(events[i].data.fd, &kicks);
        }
    }
}

/* Sleep for as long as nothing comes; and learn from how long that was whether polling would have caught it. */
static void sleep_until_kicked(VuDev *dev)
{
    int64_t before = now(), slept;

    want_kicks(dev, 1);
    if (!serve_all(dev)) {
        look(dev, -1);
    }
    if (back.connected) {
        want_kicks(dev, 0);
    }
    slept = now() - before;
    if (slept > back.poll_max_ns) {
        back.poll_ns /= 2;
    } else {
        back.poll_ns = back.poll_ns * 2 > SHORTEST_POLL_NS ? back.poll_ns * 2 : SHORTEST_POLL_NS;
    }
    back.poll_ns = back.poll_ns < back.poll_max_ns ? back.poll_ns : back.poll_max_ns;
}

static void run(VuDev *dev)
{
    int64_t last = now();
    unsigned rounds = 0;

    while (back.connected) {
        if (++rounds % ROUNDS_PER_LOOK == 0) {
            look(dev, 0);
        } else if (serve_all(dev)) {
            last = now();
        } else if (now() - last >= back.poll_ns) {
            sleep_until_kicked(dev);
            last = now();
        } else {
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
        }
    }
}

static int listen_on(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        die(path);
    }
    strcpy(address.sun_path, path);
    unlink(path);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1)) {
        die(path);
    }
    return fd;
}

static void serve_connection(int fd)
{
    memset(back.started, 0, sizeof back.started);
    back.connected = true;
    back.epoll = epoll_create1(EPOLL_CLOEXEC);
    if (!vu_init(&back.dev, (uint16_t)back.queues, fd, on_panic, NULL, set_watch, remove_watch, &interface)) {
        die("vu_init");
    }
    set_watch(&back.dev, fd, 0, NULL, NULL);
    run(&back.dev);
    vu_deinit(&back.dev);
    close(back.epoll);
}

static void usage(void)
{
    fprintf(stderr, "usage: null-backend --socket PATH [--size BYTES] [--queues N] [--copy] [--poll-us N]\n");
    exit(2);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"socket", required_argument, NULL, 's'}, {"size", required_argument, NULL, 'b'},
                                            {"queues", required_argument, NULL, 'q'}, {"copy", no_argument, NULL, 'c'},
                                            {"poll-us", required_argument, NULL, 'p'}, {NULL, 0, NULL, 0}};
    const char *path = NULL;
    int option, listener;

    while ((option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
        switch (option) {
        case 's': path = optarg; break;
        case 'b': back.size = strtoull(optarg, NULL, 0) / SECTOR * SECTOR; break;
        case 'q': back.queues = atoi(optarg); break;
        case 'c': back.copy = true; break;
        case 'p': back.poll_max_ns = atoi(optarg) * 1000; break;
        default: usage();
        }
    }
    if (!path || back.size == 0 || back.queues < 1 || back.queues > MAX_QUEUES) {
        usage();
    }
    back.poll_ns = back.poll_max_ns;
    if (back.copy) {
        back.memory = malloc(back.size);
        if (!back.memory) {
            die("memory");
        }
        memset(back.memory, 1, back.size);
    }
    signal(SIGPIPE, SIG_IGN);
    listener = listen_on(path);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

        if (fd < 0) {
            die("accept");
        }
        serve_connection(fd);
    }
}
