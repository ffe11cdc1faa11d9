/* See virtio_blk.h. Virtio 1.2, 5.2.6. */
#include "virtio_blk.h"

#include <linux/virtio_blk.h>
#include <string.h>

_Static_assert((uint64_t)VBLK_SEG_MAX * VBLK_SIZE_MAX <= VBLK_MAX_PAYLOAD, "a request within the advertised limits is accepted");

static uint64_t total_bytes(const struct iovec *iov, uint32_t count)
{
    uint64_t total = 0; /* 1024 segments below 4 GiB do not overflow */
    for (uint32_t i = 0; i < count; i++)
        total += iov[i].iov_len;
    return total;
}

/* Copy the first `bytes` out of the vector and cut them off it. The caller knows that they are there. */
static void take(struct iovec **iov, uint32_t *count, void *target, size_t bytes)
{
    uint8_t *to = target;
    while (bytes) {
        size_t part = (*iov)->iov_len < bytes ? (*iov)->iov_len : bytes;
        memcpy(to, (*iov)->iov_base, part);
        to += part;
        bytes -= part;
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + part;
        (*iov)->iov_len -= part;
        if (!(*iov)->iov_len) {
            (*iov)++;
            (*count)--;
        }
    }
}

static bool within(const struct vblk_limits *limits, uint64_t sector, uint64_t sectors)
{
#ifdef VHC_CANARY /* a mistake that the fuzzer has to find: see tests/fuzz */
    return sector + sectors <= limits->capacity;
#endif
    return sectors <= limits->capacity && sector <= limits->capacity - sectors;
}

static enum vblk_status parse_data(const struct vblk_limits *limits, struct vblk_request *request, uint64_t bytes)
{
    if (bytes == 0 || bytes % VBLK_SECTOR || bytes > limits->payload_max)
        return VBLK_IOERR;
    request->sectors = (uint32_t)(bytes / VBLK_SECTOR);
    request->payload_bytes = (uint32_t)bytes;
    if (!within(limits, request->sector, request->sectors))
        return VBLK_IOERR;
    uintptr_t addresses = 0, lengths = 0;
    for (uint32_t i = 0; i < request->payload_count; i++) {
        addresses |= (uintptr_t)request->payload[i].iov_base;
        lengths |= request->payload[i].iov_len;
    }
    request->aligned = !(addresses & (limits->align_mem - 1)) && !(lengths & (limits->align_io - 1));
    return VBLK_OK;
}

/* One segment {sector, sectors, flags}: that is the limit which is advertised. */
static enum vblk_status parse_range(const struct vblk_limits *limits, struct vblk_request *request, bool zeroes)
{
    struct virtio_blk_discard_write_zeroes range;
    if (limits->read_only)
        return VBLK_UNSUPP; /* the features are not offered then */
    if (total_bytes(request->payload, request->payload_count) != sizeof range)
        return VBLK_IOERR;
    take(&request->payload, &request->payload_count, &range, sizeof range);
    request->payload_count = 0;
    uint32_t flags = range.flags;
    if (flags & ~(zeroes ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0u))
        return VBLK_UNSUPP;
    request->sector = range.sector;
    request->sectors = range.num_sectors;
    if (!range.num_sectors || range.num_sectors > limits->discard_max || !within(limits, range.sector, range.num_sectors))
        return VBLK_IOERR;
    if (zeroes)
        request->kind = flags ? VBLK_ZERO_UNMAP : VBLK_ZERO;
    else
        request->kind = VBLK_DISCARD;
    return VBLK_OK;
}

enum vblk_status vblk_parse(const struct vblk_limits *limits, struct iovec *readable, uint32_t readable_count,
                            struct iovec *writable, uint32_t writable_count, struct vblk_request *request)
{
    memset(request, 0, sizeof *request);
    uint64_t writable_bytes = total_bytes(writable, writable_count);
    if (!writable_bytes)
        return VBLK_IOERR;
    struct iovec *last = &writable[writable_count - 1];
    while (!last->iov_len) /* the library's callers have none, a fuzzer may */
        last--;
    last->iov_len--;
    request->status = (uint8_t *)last->iov_base + last->iov_len;
    if (!last->iov_len)
        writable_count = (uint32_t)(last - writable);
    else
        writable_count = (uint32_t)(last - writable) + 1;
    uint64_t data_bytes = writable_bytes - 1;
    request->writable_bytes = data_bytes > VBLK_MAX_PAYLOAD ? 1 : (uint32_t)writable_bytes;

    struct virtio_blk_outhdr header;
    uint64_t readable_bytes = total_bytes(readable, readable_count);
    if (readable_bytes < sizeof header)
        return VBLK_IOERR;
    while (!readable->iov_len) {
        readable++;
        readable_count--;
    }
    take(&readable, &readable_count, &header, sizeof header);
    readable_bytes -= sizeof header;
    request->sector = header.sector;

    switch (header.type) {
    case VIRTIO_BLK_T_IN:
        request->kind = VBLK_READ;
        request->payload = writable;
        request->payload_count = writable_count;
        return readable_bytes ? VBLK_IOERR : parse_data(limits, request, data_bytes);
    case VIRTIO_BLK_T_OUT:
        request->kind = VBLK_WRITE;
        request->payload = readable;
        request->payload_count = readable_count;
        return data_bytes || limits->read_only ? VBLK_IOERR : parse_data(limits, request, readable_bytes);
    case VIRTIO_BLK_T_FLUSH:
        request->kind = VBLK_FLUSH;
        request->sector = 0;
        return readable_bytes || data_bytes ? VBLK_IOERR : VBLK_OK;
    case VIRTIO_BLK_T_GET_ID:
        request->kind = VBLK_GET_ID;
        request->payload = writable;
        request->payload_count = writable_count;
        request->payload_bytes = data_bytes < VBLK_ID_BYTES ? (uint32_t)data_bytes : VBLK_ID_BYTES;
        return readable_bytes || !data_bytes || data_bytes > VBLK_MAX_PAYLOAD ? VBLK_IOERR : VBLK_OK;
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        request->payload = readable;
        request->payload_count = readable_count;
        if (data_bytes)
            return VBLK_IOERR;
        return parse_range(limits, request, header.type == VIRTIO_BLK_T_WRITE_ZEROES);
    default:
        return VBLK_UNSUPP;
    }
}
