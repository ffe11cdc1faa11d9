/* The messages of the vhost-user protocol: which are sound, which have to wait until requests are settled, and what each does.
 *
 * message_judge() sees every message before libvhost-user does, and nothing that it lets through can hurt the library.
 * message_process() answers what concerns memory, rings, the in-flight area and the configuration itself; the library does the rest. */
#include "internal.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BIT(n) (1ull << (n))
#define VERSION 1u
#define WCE_OFFSET offsetof(struct virtio_blk_config, wce)

static const uint64_t protocol_features = BIT(VHOST_USER_PROTOCOL_F_MQ) | BIT(VHOST_USER_PROTOCOL_F_LOG_SHMFD) |
                                          BIT(VHOST_USER_PROTOCOL_F_SLAVE_REQ) | BIT(VHOST_USER_PROTOCOL_F_REPLY_ACK) |
                                          BIT(VHOST_USER_PROTOCOL_F_CONFIG) | BIT(VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD) |
                                          BIT(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS);

/* Every message that is taken: how long its payload is, and how many descriptors come with it. */
#define FDS_MEMORY 9 /* as many as there are regions */
#define FDS_QUEUE 10 /* one, or none with the flag that says so */
static const struct rule {
    uint8_t known, fds;
    uint16_t bytes;
} rules[VHOST_USER_MAX] = {
    [VHOST_USER_GET_FEATURES] = {1, 0, 0},
    [VHOST_USER_SET_FEATURES] = {1, 0, 8},
    [VHOST_USER_SET_OWNER] = {1, 0, 0},
    [VHOST_USER_RESET_OWNER] = {1, 0, 0},
    [VHOST_USER_SET_MEM_TABLE] = {1, FDS_MEMORY, 8},
    [VHOST_USER_SET_LOG_BASE] = {1, 1, 16},
    [VHOST_USER_SET_LOG_FD] = {1, 1, 0},
    [VHOST_USER_SET_VRING_NUM] = {1, 0, 8},
    [VHOST_USER_SET_VRING_ADDR] = {1, 0, sizeof(struct vhost_vring_addr)},
    [VHOST_USER_SET_VRING_BASE] = {1, 0, 8},
    [VHOST_USER_GET_VRING_BASE] = {1, 0, 8},
    [VHOST_USER_SET_VRING_KICK] = {1, FDS_QUEUE, 8},
    [VHOST_USER_SET_VRING_CALL] = {1, FDS_QUEUE, 8},
    [VHOST_USER_SET_VRING_ERR] = {1, FDS_QUEUE, 8},
    [VHOST_USER_GET_PROTOCOL_FEATURES] = {1, 0, 0},
    [VHOST_USER_SET_PROTOCOL_FEATURES] = {1, 0, 8},
    [VHOST_USER_GET_QUEUE_NUM] = {1, 0, 0},
    [VHOST_USER_SET_VRING_ENABLE] = {1, 0, 8},
    [VHOST_USER_SET_SLAVE_REQ_FD] = {1, 1, 0},
    [VHOST_USER_GET_CONFIG] = {1, 0, 12},
    [VHOST_USER_SET_CONFIG] = {1, 0, 12},
    [VHOST_USER_GET_INFLIGHT_FD] = {1, 0, 20},
    [VHOST_USER_SET_INFLIGHT_FD] = {1, 1, 20},
    [VHOST_USER_GET_MAX_MEM_SLOTS] = {1, 0, 0},
    [VHOST_USER_ADD_MEM_REG] = {1, 1, sizeof(VhostUserMemRegMsg)},
    [VHOST_USER_REM_MEM_REG] = {1, FDS_MEMORY, sizeof(VhostUserMemRegMsg)}, /* one or none */
};

uint64_t device_features(const struct volume *volume)
{
    uint64_t features = BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_INDIRECT_DESC) | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VHOST_F_LOG_ALL) |
                        BIT(VHOST_USER_F_PROTOCOL_FEATURES) | BIT(VIRTIO_BLK_F_SIZE_MAX) | BIT(VIRTIO_BLK_F_SEG_MAX) |
                        BIT(VIRTIO_BLK_F_BLK_SIZE) | BIT(VIRTIO_BLK_F_TOPOLOGY) | BIT(VIRTIO_BLK_F_FLUSH) | BIT(VIRTIO_BLK_F_CONFIG_WCE) |
                        BIT(VIRTIO_BLK_F_MQ);
    if (volume->config.read_only)
        return features | BIT(VIRTIO_BLK_F_RO);
    return features | BIT(VIRTIO_BLK_F_DISCARD) | BIT(VIRTIO_BLK_F_WRITE_ZEROES);
}

static enum verdict broken(struct connection *connection, const VhostUserMsg *message, const char *why)
{
    connection_close(connection, 1, "%s: %s", vu_request_to_string((unsigned)message->request), why);
    return VERDICT_BROKEN;
}

/* The queue that a message speaks of; VHC_MAX_QUEUES or more: none. */
static uint64_t queue_of(const VhostUserMsg *message)
{
    switch (message->request) {
    case VHOST_USER_SET_VRING_KICK:
    case VHOST_USER_SET_VRING_CALL:
    case VHOST_USER_SET_VRING_ERR:
        return message->payload.u64 & ~(uint64_t)VHOST_USER_VRING_NOFD_MASK;
    case VHOST_USER_SET_VRING_ADDR: {
        struct vhost_vring_addr addr;
        memcpy(&addr, &message->payload.addr, sizeof addr);
        return addr.index;
    }
    default:
        return message->payload.state.index;
    }
}

static bool names_queue(int request)
{
    return (request >= VHOST_USER_SET_VRING_NUM && request <= VHOST_USER_SET_VRING_ERR) || request == VHOST_USER_SET_VRING_ENABLE;
}

static enum verdict judge_fds(struct connection *connection, const VhostUserMsg *message)
{
    uint32_t fds = rules[message->request].fds, given = (uint32_t)message->fd_num;
    if (message->request == VHOST_USER_REM_MEM_REG) {
        fds = given <= 1 ? given : 1;
    } else if (fds == FDS_MEMORY) {
        uint32_t regions = message->payload.memory.nregions;
        if (!regions || regions > VHOST_MEMORY_BASELINE_NREGIONS ||
            message->size < offsetof(VhostUserMemory, regions) + regions * sizeof(VhostUserMemoryRegion))
            return broken(connection, message, "an impossible number of regions");
        fds = regions;
    } else if (fds == FDS_QUEUE) {
        fds = message->payload.u64 & VHOST_USER_VRING_NOFD_MASK ? 0 : 1;
        if (!fds && message->request == VHOST_USER_SET_VRING_KICK)
            return broken(connection, message, "a queue without a kick descriptor is not supported");
    }
    return given == fds ? VERDICT_PROCESS : broken(connection, message, "the wrong number of file descriptors");
}

static bool is_eventfd(int fd)
{
    char path[32], name[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(path, name, sizeof name - 1);
    if (length < 0)
        return false;
    name[length] = 0;
    return !strcmp(name, "anon_inode:[eventfd]");
}

/* A socket that is connected to a name, as the front-end's own end is: while we hold that, we would not see the front-end leave. */
bool fd_is_named_socket(int fd)
{
    struct stat status;
    struct sockaddr_un peer;
    socklen_t bytes = sizeof peer;
    if (fstat(fd, &status) < 0 || !S_ISSOCK(status.st_mode))
        return false;
    return getpeername(fd, (struct sockaddr *)&peer, &bytes) != 0 || bytes != sizeof(sa_family_t);
}

/* A pipe, or one end of a pair of sockets. */
static bool is_channel(int fd)
{
    struct stat status;
    return fstat(fd, &status) == 0 && (S_ISFIFO(status.st_mode) || S_ISSOCK(status.st_mode)) && !fd_is_named_socket(fd);
}

/* An eventfd, and for notifications to the front-end also a pipe or socket, as user-mode-linux gives. None of them may block. */
static bool usable(int fd, bool kick)
{
    if (!is_eventfd(fd) && (kick || !is_channel(fd)))
        return false;
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

static enum verdict judge_queue(struct connection *connection, const VhostUserMsg *message)
{
    uint64_t index = queue_of(message);
#ifdef VHC_CANARY /* a mistake that the fuzzer has to find: see tests/fuzz */
    index %= VHC_MAX_QUEUES;
#else
    if (index >= connection->dev.max_queues)
        return broken(connection, message, "a queue that does not exist");
#endif
    struct queue *queue = &connection->queues[index];
    uint32_t value = message->payload.state.num;
    switch (message->request) {
    case VHOST_USER_SET_VRING_NUM:
        if (!value || value > VIRTQUEUE_MAX_SIZE || value & (value - 1))
            return broken(connection, message, "an impossible queue size");
        /* The ring and its in-flight area were found to be large enough for the size that it was started with. */
        return queue->running ? broken(connection, message, "the queue is running") : VERDICT_PROCESS;
    case VHOST_USER_SET_VRING_BASE:
        if (value > UINT16_MAX)
            return broken(connection, message, "an impossible index");
        return queue->running ? VERDICT_SETTLE : VERDICT_PROCESS;
    case VHOST_USER_SET_VRING_ADDR: {
        struct vhost_vring_addr addr;
        memcpy(&addr, &message->payload.addr, sizeof addr);
        bool same = addr.desc_user_addr == queue->vq->vra.desc_user_addr && addr.used_user_addr == queue->vq->vra.used_user_addr &&
                    addr.avail_user_addr == queue->vq->vra.avail_user_addr;
        return queue->running && !same ? VERDICT_SETTLE : VERDICT_PROCESS;
    }
    case VHOST_USER_SET_VRING_KICK:
        if (!usable(message->fds[0], true))
            return broken(connection, message, "the kick descriptor is no eventfd");
        return queue->running ? VERDICT_SETTLE : VERDICT_PROCESS;
    case VHOST_USER_SET_VRING_CALL:
    case VHOST_USER_SET_VRING_ERR:
        if (message->fd_num && !usable(message->fds[0], false))
            return broken(connection, message, "not a descriptor for notifications");
        return VERDICT_PROCESS;
    case VHOST_USER_GET_VRING_BASE:
        if (!queue->running)
            return VERDICT_PROCESS;
        /* The in-flight area does not migrate: what is dropped while the log is on would be lost. With the last queue the disk goes over
         * to the other side, which may start its own as soon as this is answered. */
        if (connection->dev.features & BIT(VHOST_F_LOG_ALL) && !connection->volume->given_up)
            return connection->running_queues == 1 ? VERDICT_HAND_OVER : VERDICT_SETTLE;
        return queue->vq->inflight ? VERDICT_SETTLE_OR_DROP : VERDICT_SETTLE;
    default:
        return VERDICT_PROCESS;
    }
}

static enum verdict judge_features(struct connection *connection, const VhostUserMsg *message)
{
    uint64_t features = message->payload.u64, changed = features ^ connection->dev.features;
    if (features & ~device_features(connection->volume))
        return broken(connection, message, "features that were not offered");
    if (!(features & BIT(VIRTIO_F_VERSION_1)))
        return broken(connection, message, "legacy drivers are not supported: the guest has to use virtio 1.0");
    return connection->running_queues && changed & ~BIT(VHOST_F_LOG_ALL) ? VERDICT_SETTLE : VERDICT_PROCESS;
}

static enum verdict judge_config(struct connection *connection, const VhostUserMsg *message)
{
    VhostUserConfig config = message->payload.config;
    if (config.size > VHOST_USER_MAX_CONFIG_SIZE || message->size < VHOST_USER_CONFIG_HDR_SIZE + config.size)
        return broken(connection, message, "an impossible size");
    if (message->request == VHOST_USER_SET_CONFIG && (config.offset != WCE_OFFSET || config.size != 1))
        return broken(connection, message, "only the write cache can be set");
    return message->request == VHOST_USER_SET_CONFIG ? VERDICT_LOOK : VERDICT_PROCESS;
}

enum verdict message_judge(struct connection *connection, const VhostUserMsg *message)
{
    int request = message->request;
    if (request <= 0 || request >= VHOST_USER_MAX || !rules[request].known)
        return broken(connection, message, "not supported");
    if ((message->flags & VHOST_USER_VERSION_MASK) != VERSION || message->flags & VHOST_USER_REPLY_MASK)
        return broken(connection, message, "impossible flags");
    if (message->size < rules[request].bytes)
        return broken(connection, message, "too short");
    enum verdict verdict = judge_fds(connection, message);
    if (verdict != VERDICT_PROCESS)
        return verdict;
    if (names_queue(request))
        return judge_queue(connection, message);
    switch (request) {
    case VHOST_USER_SET_FEATURES:
        return judge_features(connection, message);
    case VHOST_USER_SET_PROTOCOL_FEATURES:
        return message->payload.u64 & ~protocol_features ? broken(connection, message, "features that were not offered") : VERDICT_PROCESS;
    case VHOST_USER_GET_CONFIG:
    case VHOST_USER_SET_CONFIG:
        return judge_config(connection, message);
    case VHOST_USER_SET_SLAVE_REQ_FD:
        return is_channel(message->fds[0]) ? VERDICT_PROCESS : broken(connection, message, "no pair of sockets");
    case VHOST_USER_SET_LOG_FD:
        return usable(message->fds[0], false) ? VERDICT_PROCESS : broken(connection, message, "not a descriptor for notifications");
    case VHOST_USER_SET_MEM_TABLE:
    case VHOST_USER_ADD_MEM_REG:
    case VHOST_USER_REM_MEM_REG:
    case VHOST_USER_SET_INFLIGHT_FD:
    case VHOST_USER_RESET_OWNER:
        return connection->running_queues ? VERDICT_SETTLE : VERDICT_PROCESS;
    default:
        return VERDICT_PROCESS;
    }
}

static void reply_u64(VhostUserMsg *message, uint64_t value)
{
    message->size = sizeof value;
    message->payload.u64 = value;
}

static bool set_address(struct connection *connection, const VhostUserMsg *message)
{
    struct vhost_vring_addr addr;
    memcpy(&addr, &message->payload.addr, sizeof addr);
    struct queue *queue = &connection->queues[addr.index];
    VuVirtq *vq = queue->vq;
    vq->vra = addr;
    vq->vring.flags = addr.flags;
    vq->vring.log_guest_addr = addr.log_guest_addr;
    if (!queue_map(connection, queue)) {
        connection_close(connection, 1, "queue %u does not lie in the memory", queue->index);
        return false;
    }
    vq->used_idx = le16toh(*(volatile uint16_t *)&vq->vring.used->idx);
    return true;
}

static bool set_descriptor(struct connection *connection, const VhostUserMsg *message)
{
    struct queue *queue = &connection->queues[queue_of(message)];
    VuVirtq *vq = queue->vq;
    int fd = message->fd_num ? message->fds[0] : -1;
    int *slot = message->request == VHOST_USER_SET_VRING_KICK ? &vq->kick_fd
                : message->request == VHOST_USER_SET_VRING_CALL ? &vq->call_fd : &vq->err_fd;
    vhc_engine *engine = connection->volume->engine;
    if (*slot >= 0) {
        if (slot == &vq->kick_fd)
            watch_remove(engine, *slot);
        close(*slot);
    }
    *slot = fd;
    if (slot == &vq->call_fd && queue->running)
        queue->pushed = true; /* what the old descriptor may have been told in vain */
    if (slot != &vq->kick_fd)
        return true;
    /* Edge-triggered: a semaphore eventfd stays readable for as many reads as its owner likes. */
    if (!watch_add(engine, fd, EPOLLIN | EPOLLET, WATCH(WATCH_KICK, queue->index, connection->volume->number))) {
        connection_close(connection, 1, "cannot watch a kick descriptor: %s", strerror(errno));
        return false;
    }
    vq->started = true;
    return queue_start(connection, queue);
}

static void set_write_cache(struct connection *connection, uint8_t value)
{
    struct volume *volume = connection->volume;
    volume->config_space[WCE_OFFSET] = value != 0;
    engine_event(volume->engine, VHC_EV_WCE, volume->number, value != 0);
}

bool connection_config_changed(struct connection *connection)
{
    VuDev *dev = &connection->dev;
    uint64_t wanted = BIT(VHOST_USER_PROTOCOL_F_SLAVE_REQ) | BIT(VHOST_USER_PROTOCOL_F_CONFIG);
    if (connection->state != CONNECTION_ACTIVE || (dev->protocol_features & wanted) != wanted || dev->slave_fd < 0)
        return false;
    VhostUserMsg message = {.request = VHOST_USER_SLAVE_CONFIG_CHANGE_MSG, .flags = VERSION};
    struct pollfd channel = {.fd = dev->slave_fd, .events = POLLOUT};
    pthread_mutex_lock(&dev->slave_mutex);
    /* Twelve bytes are taken at once or not at all; nobody is waited for. */
    bool told = poll(&channel, 1, 0) == 1 && channel.revents & POLLOUT &&
                write(dev->slave_fd, &message, VHOST_USER_HDR_SIZE) == (ssize_t)VHOST_USER_HDR_SIZE;
    pthread_mutex_unlock(&dev->slave_mutex);
    return told;
}

static void get_config(struct connection *connection, VhostUserMsg *message)
{
    const uint8_t *space = connection->volume->config_space;
    uint32_t offset = message->payload.config.offset, size = message->payload.config.size;
    for (uint32_t i = 0; i < size; i++)
        message->payload.config.region[i] = (uint64_t)offset + i < sizeof connection->volume->config_space ? space[offset + i] : 0;
    message->size = (uint32_t)(VHOST_USER_CONFIG_HDR_SIZE + size);
}

static void close_fds(VhostUserMsg *message)
{
    for (int i = 0; i < message->fd_num; i++)
        close(message->fds[i]);
    message->fd_num = 0;
}

/* 1: done, and *do_reply tells whether the message is to be sent back as an answer; 0: the library does it. */
int message_process(VuDev *dev, VhostUserMsg *message, int *do_reply)
{
    struct connection *connection = (struct connection *)((char *)dev - offsetof(struct connection, dev));
    bool need_reply = message->flags & VHOST_USER_NEED_REPLY_MASK, fine = true;
    *do_reply = 0;
    switch (message->request) {
    case VHOST_USER_GET_FEATURES:
        reply_u64(message, device_features(connection->volume));
        *do_reply = 1;
        break;
    case VHOST_USER_GET_PROTOCOL_FEATURES:
        reply_u64(message, protocol_features);
        *do_reply = 1;
        break;
    case VHOST_USER_RESET_OWNER:
        for (uint32_t i = 0; i < dev->max_queues; i++)
            connection->queues[i].disabled = true;
        break;
    case VHOST_USER_SET_VRING_ENABLE:
        connection->queues[queue_of(message)].disabled = !message->payload.state.num;
        if (connection->queues[queue_of(message)].running)
            queue_set_polled(connection, &connection->queues[queue_of(message)], true); /* look at what came while it was disabled */
        return 0;
    case VHOST_USER_SET_MEM_TABLE:
        fine = memory_set_table(connection, message);
        close_fds(message);
        break;
    case VHOST_USER_ADD_MEM_REG:
        fine = memory_add(connection, message);
        close_fds(message);
        break;
    case VHOST_USER_REM_MEM_REG:
        fine = memory_remove(connection, message);
        close_fds(message);
        break;
    case VHOST_USER_SET_LOG_BASE:
        fine = memory_set_log(connection, message);
        close_fds(message);
        if (fine) {
            reply_u64(message, 0);
            *do_reply = 1; /* always: the front-end waits before it uses the log */
        }
        break;
    case VHOST_USER_SET_VRING_ADDR:
        fine = set_address(connection, message);
        break;
    case VHOST_USER_SET_VRING_KICK:
    case VHOST_USER_SET_VRING_CALL:
    case VHOST_USER_SET_VRING_ERR:
        fine = set_descriptor(connection, message);
        message->fd_num = 0;
        break;
    case VHOST_USER_GET_CONFIG:
        get_config(connection, message);
        *do_reply = 1;
        break;
    case VHOST_USER_SET_CONFIG:
        set_write_cache(connection, message->payload.config.region[0]);
        break;
    case VHOST_USER_GET_INFLIGHT_FD:
        fine = inflight_create(connection, message);
        if (fine) {
            connection->reply_fd = message->fds[0];
            *do_reply = 1;
        }
        break;
    case VHOST_USER_SET_INFLIGHT_FD:
        fine = inflight_adopt(connection, message);
        close_fds(message);
        break;
    default:
        return 0;
    }
    if (!fine && need_reply) {
        reply_u64(message, 1); /* the library would say that all is well */
        *do_reply = 1;
    }
    if (*do_reply)
        message->flags = 0; /* set by the library when it sends */
    return 1;
}

static void features_set(VuDev *dev, uint64_t features)
{
    struct connection *connection = (struct connection *)((char *)dev - offsetof(struct connection, dev));
    engine_event(connection->volume->engine, VHC_EV_FEATURES, connection->volume->number, features);
}

/* Called by the library for GET_VRING_BASE, before it closes the queue's descriptors. */
static void started_changed(VuDev *dev, int index, bool started)
{
    struct connection *connection = (struct connection *)((char *)dev - offsetof(struct connection, dev));
    if (!started)
        queue_stop(&connection->queues[index], connection);
}

const VuDevIface connection_interface = {
    .set_features = features_set,
    .process_msg = message_process,
    .queue_set_started = started_changed,
};
