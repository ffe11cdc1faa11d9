/* The split virtqueue: requests off the available ring, answers onto the used ring.
 *
 * The state is libvhost-user's VuVirtq, but not its vu_queue_pop() and vu_queue_push(), because a hostile guest can hurt the other
 * volumes through them: they read a descriptor twice while the guest may change it, copy an indirect table that lies in two regions
 * beyond the end of a buffer on the stack, walk tables of 2^28 entries when logging, and assert that the log covers an address that
 * the guest has chosen. Here every descriptor is read once, into private memory, and a chain has at most 1024 segments.
 *
 * The in-flight area is kept as the specification asks, one request at a time, so a daemon killed at any point leaves an area from
 * which exactly the unanswered requests are resubmitted. */
#include "internal.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_SEGMENTS VIRTQUEUE_MAX_SIZE

struct chain {
    struct iovec iov[MAX_SEGMENTS]; /* readable segments first */
    uint32_t readable, writable;
};

static uint16_t available_index(const VuVirtq *vq)
{
    return le16toh(__atomic_load_n(&vq->vring.avail->idx, __ATOMIC_ACQUIRE));
}

/* The library writes it into the ring and not into the dirty log. */
static void set_notification(struct connection *connection, VuVirtq *vq, bool enabled)
{
    vu_queue_set_notification(&connection->dev, vq, enabled);
    if (!memory_logs(connection))
        return;
    if (!(connection->dev.features & 1ull << VIRTIO_RING_F_EVENT_IDX))
        memory_log_guest(connection, vq->vring.log_guest_addr + offsetof(struct vring_used, flags), sizeof vq->vring.used->flags);
    else if (enabled)
        memory_log_guest(connection, vq->vring.log_guest_addr + offsetof(struct vring_used, ring) + vq->vring.num * sizeof vq->vring.used->ring[0],
                         sizeof(uint16_t));
}

bool queue_has_work(struct queue *queue)
{
    VuVirtq *vq = queue->vq;
    return vq->resubmit_num || vq->shadow_avail_idx != vq->last_avail_idx ||
           (vq->shadow_avail_idx = available_index(vq)) != vq->last_avail_idx;
}

static bool add_segment(struct connection *connection, struct chain *chain, uint64_t address, uint32_t bytes, bool writable)
{
    if (!bytes || (!writable && chain->writable)) {
        connection_close(connection, 1, bytes ? "a readable descriptor follows a writable one" : "a descriptor of no bytes");
        return false;
    }
    while (bytes) {
        uint64_t part = bytes;
        uint32_t count = chain->readable + chain->writable;
        if (count == MAX_SEGMENTS) {
            connection_close(connection, 1, "a request of more than %d segments", MAX_SEGMENTS);
            return false;
        }
        chain->iov[count].iov_base = memory_translate(connection, address, &part);
        chain->iov[count].iov_len = part;
        if (!chain->iov[count].iov_base) {
            connection_close(connection, 1, "a descriptor points to guest address %#llx, where there is no memory", (unsigned long long)address);
            return false;
        }
        if (writable)
            chain->writable++;
        else
            chain->readable++;
        address += part;
        bytes -= (uint32_t)part;
    }
    return true;
}

/* One entry of a descriptor table that begins at `table`, read once. */
static struct vring_desc read_descriptor(const struct vring_desc *table, uint32_t index)
{
    struct vring_desc entry;
    memcpy(&entry, (const void *)&table[index], sizeof entry);
    __asm__ volatile("" ::: "memory"); /* and not again */
    return entry;
}

/* An entry of an indirect table may lie in another region than the one before. */
static bool read_indirect(struct connection *connection, uint64_t table, uint32_t index, struct vring_desc *entry)
{
    uint8_t *to = (uint8_t *)entry;
    uint64_t address = table + (uint64_t)index * sizeof *entry, left = sizeof *entry;
    while (left) {
        uint64_t part = left;
        const void *from = memory_translate(connection, address, &part);
        if (!from)
            return false;
        memcpy(to, from, part);
        to += part;
        address += part;
        left -= part;
    }
    __asm__ volatile("" ::: "memory");
    return true;
}

static bool read_chain(struct connection *connection, const VuVirtq *vq, uint32_t head, struct chain *chain)
{
    uint64_t table = 0;
    uint32_t limit = vq->vring.num, index = head;
    bool indirect = false;
    chain->readable = chain->writable = 0;
    for (uint32_t walked = 0; walked < limit; walked++) {
        struct vring_desc entry;
        if (!indirect)
            entry = read_descriptor(vq->vring.desc, index);
        else if (!read_indirect(connection, table, index, &entry)) {
            connection_close(connection, 1, "an indirect table where there is no memory");
            return false;
        }
        uint16_t flags = le16toh(entry.flags);
        uint32_t bytes = le32toh(entry.len);
        if (flags & VRING_DESC_F_INDIRECT) {
            uint32_t entries = bytes / sizeof entry;
            if (indirect || walked || bytes % sizeof entry || !entries || entries > MAX_SEGMENTS || flags & VRING_DESC_F_NEXT) {
                connection_close(connection, 1, "an indirect descriptor out of place or of impossible size");
                return false;
            }
            table = le64toh(entry.addr);
            limit = entries + 1; /* the one just walked counts */
            index = 0;
            indirect = true;
            continue;
        }
        if (!add_segment(connection, chain, le64toh(entry.addr), bytes, flags & VRING_DESC_F_WRITE))
            return false;
        if (!(flags & VRING_DESC_F_NEXT))
            return true;
        index = le16toh(entry.next);
        if (index >= (indirect ? limit - 1 : limit)) {
            connection_close(connection, 1, "a descriptor is followed by entry %u, which does not exist", index);
            return false;
        }
    }
    connection_close(connection, 1, "a loop of descriptors");
    return false;
}

/* The number of the next chain's head; false: there is none, or the ring is broken. */
static bool next_head(struct connection *connection, VuVirtq *vq, uint32_t *head, bool *again)
{
    *again = vq->resubmit_num > 0;
    if (*again) {
        *head = vq->resubmit_list[--vq->resubmit_num].index;
        return true;
    }
    if (vq->shadow_avail_idx == vq->last_avail_idx) {
        vq->shadow_avail_idx = available_index(vq);
        if (vq->shadow_avail_idx == vq->last_avail_idx)
            return false;
    }
    if ((uint16_t)(vq->shadow_avail_idx - vq->last_avail_idx) > vq->vring.num || vq->inuse >= (int)vq->vring.num) {
        connection_close(connection, 1, "the available index moved from %u to %u in a ring of %u with %d in use", vq->last_avail_idx,
                         vq->shadow_avail_idx, vq->vring.num, vq->inuse);
        return false;
    }
    *head = le16toh(*(volatile uint16_t *)&vq->vring.avail->ring[vq->last_avail_idx & (vq->vring.num - 1)]);
    if (*head >= vq->vring.num) {
        connection_close(connection, 1, "descriptor %u in a ring of %u", *head, vq->vring.num);
        return false;
    }
    return true;
}

static void answer_directly(struct connection *connection, struct queue *queue, struct request *request, const struct vblk_request *parsed,
                            enum vblk_status status)
{
    struct volume *volume = connection->volume;
    if (status == VBLK_OK) { /* GET_ID */
        char serial[VBLK_ID_BYTES];
        memcpy(serial, volume->config.serial, sizeof serial);
        request->kind = VHC_REQ_READ;
        request->payload_bytes = parsed->payload_bytes;
        request_copy_out(request, 0, parsed->payload_bytes, (const uint8_t *)serial);
        volume->stats.get_id++;
    } else {
        volume->stats.bad_requests++;
        volume->bad_requests++;
    }
    if (parsed->status) {
        *parsed->status = status;
        if (memory_logs(connection)) {
            memory_log_host(connection, parsed->status, 1);
            for (uint32_t i = 0; status == VBLK_OK && i < request->payload_count; i++)
                memory_log_host(connection, request->payload[i].iov_base, request->payload[i].iov_len);
        }
    }
    queue_push(connection, queue, request->head, parsed->status ? parsed->writable_bytes : 0);
    request_free(request);
}

static struct request *parse(struct connection *connection, struct queue *queue, uint32_t head, const struct chain *chain)
{
    struct volume *volume = connection->volume;
    struct request *request = request_new(connection, chain->readable + chain->writable);
    if (!request) {
        connection_close(connection, 1, "out of memory");
        return NULL;
    }
    memcpy(request->chain, chain->iov, (chain->readable + chain->writable) * sizeof chain->iov[0]);
    struct vblk_request parsed;
    enum vblk_status status =
        vblk_parse(&volume->limits, request->chain, chain->readable, request->chain + chain->readable, chain->writable, &parsed);
    request->queue = queue->index;
    request->head = (uint16_t)head;
    request->kind = parsed.kind;
    request->flags = parsed.aligned ? VHC_REQ_ALIGNED : 0;
    request->sector = parsed.sector;
    request->sectors = parsed.sectors;
    request->writable_bytes = parsed.writable_bytes;
    request->status = parsed.status;
    request->payload = parsed.payload;
    request->payload_count = parsed.payload_count;
    request->payload_bytes = parsed.payload_bytes;
    request->popped_ns = volume->engine->now_ns;
    if (status != VBLK_OK || parsed.kind == VBLK_GET_ID) {
        answer_directly(connection, queue, request, &parsed, status);
        return NULL;
    }
    return request;
}

/* Report at most `limit` requests of this queue; what is answered here counts too. Returns how many were looked at. */
uint32_t queue_pop_all(struct connection *connection, struct queue *queue, uint32_t limit)
{
    VuVirtq *vq = queue->vq;
    struct chain chain;
    uint32_t popped = 0, head;
    bool again;
    while (popped < limit && connection_pops(connection) && !connection->bus_error && next_head(connection, vq, &head, &again)) {
        if (!again) {
            vq->last_avail_idx++;
            vq->inuse++;
            if (vq->inflight) {
                vq->inflight->desc[head].counter = vq->counter++;
                __atomic_store_n(&vq->inflight->desc[head].inflight, 1, __ATOMIC_RELEASE);
            }
        } else {
            connection->volume->stats.resubmitted++;
        }
        popped++;
        if (!read_chain(connection, vq, head, &chain))
            break;
        struct request *request = parse(connection, queue, head, &chain);
        if (request)
            request_report(request);
    }
    if (popped && vq->notification && connection->dev.features & 1ull << VIRTIO_RING_F_EVENT_IDX)
        set_notification(connection, vq, true);
    return popped;
}

void queue_push(struct connection *connection, struct queue *queue, uint16_t head, uint32_t written_bytes)
{
    VuVirtq *vq = queue->vq;
    struct vring_used *used = vq->vring.used;
    if (connection->bus_error || !used)
        return;
    uint32_t position = vq->used_idx & (vq->vring.num - 1);
    used->ring[position].id = htole32(head);
    used->ring[position].len = htole32(written_bytes);
    if (vq->inflight)
        vq->inflight->last_batch_head = head;
    vq->used_idx++;
    __atomic_store_n(&used->idx, htole16(vq->used_idx), __ATOMIC_RELEASE);
    if (vq->inflight) {
        __atomic_store_n(&vq->inflight->desc[head].inflight, 0, __ATOMIC_RELEASE);
        __atomic_store_n(&vq->inflight->used_idx, vq->used_idx, __ATOMIC_RELEASE);
    }
    if (memory_logs(connection)) {
        memory_log_guest(connection, vq->vring.log_guest_addr + offsetof(struct vring_used, ring) + position * sizeof used->ring[0],
                         sizeof used->ring[0]);
        memory_log_guest(connection, vq->vring.log_guest_addr + offsetof(struct vring_used, idx), sizeof used->idx);
    }
    vq->inuse--;
    if ((uint16_t)(vq->used_idx - vq->signalled_used) == 0)
        vq->signalled_used_valid = false; /* the index has gone round once without a notification */
    queue->pushed = true;
}

/* One notification for all answers since the last, if the driver wants one. The descriptor does not block: when it is full, a
 * notification is pending anyway. */
void queue_notify(struct connection *connection, struct queue *queue)
{
    VuVirtq *vq = queue->vq;
    queue->pushed = false;
    if (!vq->vring.avail || connection->bus_error)
        return;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the used index is visible before the driver's wish is read */
    bool wanted;
    if (connection->dev.features & 1ull << VIRTIO_RING_F_EVENT_IDX) {
        uint16_t event = le16toh(*(volatile uint16_t *)&vq->vring.avail->ring[vq->vring.num]);
        wanted = !vq->signalled_used_valid || vring_need_event(event, vq->used_idx, vq->signalled_used);
        vq->signalled_used = vq->used_idx;
        vq->signalled_used_valid = true;
    } else {
        wanted = !(le16toh(*(volatile uint16_t *)&vq->vring.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
    }
    uint64_t one = 1;
    if (wanted && vq->call_fd >= 0 && !connection->bus_error) {
        connection->volume->stats.notifications++;
        if (write(vq->call_fd, &one, sizeof one) < 0)
            return; /* full */
    }
}

void volume_notify(struct volume *volume)
{
    struct connection *connection = &volume->connection;
    for (uint32_t i = 0; i < connection->dev.max_queues; i++)
        if (connection->queues[i].pushed)
            queue_notify(connection, &connection->queues[i]);
    if (connection->log_written) {
        uint64_t one = 1;
        connection->log_written = false;
        if (connection->dev.log_call_fd >= 0 && write(connection->dev.log_call_fd, &one, sizeof one) < 0)
            return; /* full */
    }
}

void queue_set_polled(struct connection *connection, struct queue *queue, bool polled)
{
    if (queue->polled == polled)
        return;
    queue->polled = polled;
    if (polled) {
        connection->polled_queues++;
        connection->volume->engine->polled_queues++;
    } else {
        connection->polled_queues--;
        connection->volume->engine->polled_queues--;
    }
    if (queue->running && queue->vq->vring.avail && !connection->bus_error)
        set_notification(connection, queue->vq, !polled);
}
