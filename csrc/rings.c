/* Setting up and tearing down rings, and the in-flight area that lets a new back-end know what the last one had begun.
 *
 * libvhost-user reads the area several times while the front-end can change it, and trusts what it finds. Here the area is copied
 * once, checked, and the list of requests to resubmit is made from the copy. */
#include "internal.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define INFLIGHT_ALIGNMENT 64u
#define INFLIGHT_VERSION 1u

static uint64_t inflight_queue_bytes(uint32_t queue_size)
{
    uint64_t bytes = sizeof(VuVirtqInflight) + (uint64_t)queue_size * sizeof(VuDescStateSplit);
    return (bytes + INFLIGHT_ALIGNMENT - 1) / INFLIGHT_ALIGNMENT * INFLIGHT_ALIGNMENT;
}

/* Find the rings again, in the addresses that the front-end gave. False: they do not lie wholly in its memory. */
bool queue_map(struct connection *connection, struct queue *queue)
{
    VuVirtq *vq = queue->vq;
    uint64_t num = vq->vring.num;
    uint64_t desc = vq->vra.desc_user_addr, avail = vq->vra.avail_user_addr, used = vq->vra.used_user_addr;
    vq->vring.desc = NULL;
    vq->vring.avail = NULL;
    vq->vring.used = NULL;
    if (!num)
        return false;
    /* with the event index behind each ring */
    void *descriptors = memory_at(connection, desc, num * sizeof(struct vring_desc));
    void *available = memory_at(connection, avail, sizeof(struct vring_avail) + (num + 1) * sizeof(uint16_t));
    void *answers = memory_at(connection, used, sizeof(struct vring_used) + num * sizeof(struct vring_used_elem) + sizeof(uint16_t));
    if (!descriptors || !available || !answers)
        return false;
    if ((uintptr_t)descriptors % 16 || (uintptr_t)available % 2 || (uintptr_t)answers % 4)
        return false;
    vq->vring.desc = descriptors;
    vq->vring.avail = available;
    vq->vring.used = answers;
    return true;
}

bool inflight_create(struct connection *connection, VhostUserMsg *message)
{
    uint32_t queues = message->payload.inflight.num_queues, queue_size = message->payload.inflight.queue_size;
    if (!queues || queues > connection->dev.max_queues || !queue_size || queue_size > VIRTQUEUE_MAX_SIZE) {
        connection_close(connection, 1, "an in-flight area for %u queues of %u", queues, queue_size);
        return false;
    }
    uint64_t bytes = inflight_queue_bytes(queue_size) * queues;
    int fd = memfd_create("vhost-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) < 0) {
        connection_close(connection, 1, "cannot make an in-flight area: %s", strerror(errno));
        if (fd >= 0)
            close(fd);
        return false;
    }
    connection->inflight_ours = true;
    message->payload.inflight.mmap_size = bytes;
    message->payload.inflight.mmap_offset = 0;
    message->fds[0] = fd; /* closed by the caller when it has been sent */
    message->fd_num = 1;
    return true;
}

/* An area that this volume has not seen before and that is not fresh comes from a back-end before us. */
static void note_area(struct connection *connection, const struct stat *status, bool fresh)
{
    struct volume *volume = connection->volume;
    bool known = connection->inflight_ours || (volume->inflight_dev == status->st_dev && volume->inflight_ino == status->st_ino);
    volume->inflight_dev = status->st_dev;
    volume->inflight_ino = status->st_ino;
    if (!fresh && !known)
        engine_event(volume->engine, VHC_EV_RESUMED, volume->number, 0);
}

static void forget_area(struct connection *connection)
{
    VuDevInflightInfo *info = &connection->dev.inflight_info;
    for (uint32_t i = 0; i < connection->dev.max_queues; i++)
        connection->queues[i].vq->inflight = NULL;
    if (info->addr) {
        sigbus_forget(info->addr);
        munmap(info->addr, info->size);
        info->addr = NULL;
    }
}

bool inflight_adopt(struct connection *connection, const VhostUserMsg *message)
{
    VuDev *dev = &connection->dev;
    VhostUserInflight given = message->payload.inflight;
    struct stat status;
    uint64_t end, queue_bytes = inflight_queue_bytes(given.queue_size);
    if (!given.num_queues || given.num_queues > dev->max_queues || !given.queue_size || given.queue_size > VIRTQUEUE_MAX_SIZE ||
        given.mmap_size < queue_bytes * given.num_queues || given.mmap_offset % VHC_BLOCK ||
        __builtin_add_overflow(given.mmap_size, given.mmap_offset, &end) || fstat(message->fds[0], &status) < 0 ||
        !S_ISREG(status.st_mode) || (uint64_t)status.st_size < end) {
        connection_close(connection, 1, "an in-flight area of impossible shape: %u queues of %u in %llu bytes", given.num_queues,
                         given.queue_size, (unsigned long long)given.mmap_size);
        return false;
    }
    uint64_t bytes = queue_bytes * given.num_queues;
    uint8_t *area = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, message->fds[0], (off_t)given.mmap_offset);
    if (area == MAP_FAILED) {
        connection_close(connection, 1, "the in-flight area cannot be mapped: %s", strerror(errno));
        return false;
    }
    if (!sigbus_watch(area, bytes, &connection->bus_error)) {
        munmap(area, bytes);
        connection_close(connection, 1, "too many memory regions in this process");
        return false;
    }
    forget_area(connection);
    dev->inflight_info = (VuDevInflightInfo){.fd = -1, .addr = area, .size = bytes};
    connection->inflight_queue_size = given.queue_size;
    bool fresh = true;
    for (uint32_t i = 0; i < given.num_queues; i++) {
        VuVirtqInflight *inflight = (VuVirtqInflight *)(area + i * queue_bytes);
        fresh = fresh && !inflight->version;
        inflight->desc_num = given.queue_size;
        connection->queues[i].vq->inflight = inflight;
    }
    note_area(connection, &status, fresh);
    connection->resumed = !fresh;
    for (uint32_t i = 0; i < dev->max_queues; i++)
        if (connection->queues[i].running && !queue_start(connection, &connection->queues[i]))
            return false;
    return true;
}

static int newest_first(const void *a, const void *b)
{
    uint64_t x = ((const VuVirtqInflightDesc *)a)->counter, y = ((const VuVirtqInflightDesc *)b)->counter;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* What the last back-end had begun and not answered, oldest last: resubmission takes from the end. */
static bool resume(struct connection *connection, struct queue *queue)
{
    VuVirtq *vq = queue->vq;
    VuVirtqInflight *inflight = vq->inflight;
    uint32_t count = 0, num = vq->vring.num;
    if (!inflight->version) {
        inflight->version = INFLIGHT_VERSION;
        inflight->used_idx = vq->used_idx;
        vq->counter = 1;
        return true;
    }
    if (inflight->used_idx != vq->used_idx) {
        /* Killed between the answer and the note of it: the last answer is not in flight. */
        uint16_t last = *(volatile uint16_t *)&inflight->last_batch_head;
        if (last < num)
            inflight->desc[last].inflight = 0;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        inflight->used_idx = vq->used_idx;
    }
    VuVirtqInflightDesc *list = calloc(num, sizeof *list);
    if (!list) {
        connection_close(connection, 1, "out of memory");
        return false;
    }
    uint64_t newest = 0;
    for (uint32_t i = 0; i < num; i++) {
        VuDescStateSplit state = *(volatile VuDescStateSplit *)&inflight->desc[i];
        if (!state.inflight)
            continue;
        list[count++] = (VuVirtqInflightDesc){.index = (uint16_t)i, .counter = state.counter};
        if (state.counter > newest)
            newest = state.counter;
    }
    qsort(list, count, sizeof *list, newest_first);
    vq->counter = newest + 1;
    vq->inuse = (int)count;
    vq->shadow_avail_idx = vq->last_avail_idx = (uint16_t)(vq->used_idx + count);
    vq->resubmit_list = list;
    vq->resubmit_num = (uint16_t)count;
    return true;
}

/* The front-end has given its kick descriptor, which starts the queue. Nothing is popped here. */
bool queue_start(struct connection *connection, struct queue *queue)
{
    struct volume *volume = connection->volume;
    VuVirtq *vq = queue->vq;
    if (!vq->vring.desc || !queue_map(connection, queue)) {
        connection_close(connection, 1, "queue %u is started without a ring", queue->index);
        return false;
    }
    if (vq->inflight && vq->vring.num > connection->inflight_queue_size) {
        connection_close(connection, 1, "queue %u is larger than its in-flight area", queue->index);
        return false;
    }
    free(vq->resubmit_list);
    vq->resubmit_list = NULL;
    vq->resubmit_num = 0;
    vq->inuse = 0;
    vq->signalled_used_valid = false;
    vq->used_idx = le16toh(*(volatile uint16_t *)&vq->vring.used->idx);
    vq->shadow_avail_idx = vq->last_avail_idx;
    if (vq->inflight && !resume(connection, queue))
        return false;
    volume->given_up = false;
    if (!queue->running) {
        queue->running = true;
        connection->running_queues++;
    }
    queue_set_polled(connection, queue, false);
    vq->notification = true;
    queue_set_polled(connection, queue, true); /* so that the next look finds what is waiting */
    engine_event(volume->engine, VHC_EV_QUEUE, volume->number, queue->index | 1u << 16 | (uint64_t)vq->resubmit_num << 32);
    if (connection->resumed)
        connection_config_changed(connection);
    connection->resumed = false;
    return true;
}

void queue_stop(struct queue *queue, struct connection *connection)
{
    struct volume *volume = connection->volume;
    if (!queue->running)
        return;
    if (queue->pushed)
        queue_notify(connection, queue);
    queue_set_polled(connection, queue, false);
    queue->running = false;
    connection->running_queues--;
    free(queue->vq->resubmit_list);
    queue->vq->resubmit_list = NULL;
    queue->vq->resubmit_num = 0;
    /* What was dropped, or never taken from the resubmission list, is still marked in the area for the next start. */
    struct request **link = &connection->postponed;
    while (*link) {
        struct request *request = *link;
        if (request->queue == queue->index) {
            *link = request->next;
            request_free(request);
        } else {
            link = &request->next;
        }
    }
    engine_event(volume->engine, VHC_EV_QUEUE, volume->number, queue->index);
}
