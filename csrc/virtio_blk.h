/* Virtio-blk requests: what a chain of guest memory asks for. Pure: it reads the header and the discard segments, and touches
 * nothing else. Knows nothing of rings, so that it can be fuzzed. */
#ifndef VHC_VIRTIO_BLK_H
#define VHC_VIRTIO_BLK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define VBLK_SECTOR 512u
/* The most data that one request may carry; seg_max * size_max stays below it. */
#define VBLK_MAX_PAYLOAD (16u << 20)
#define VBLK_SEG_MAX 126u        /* a ring of 128, less header and status */
#define VBLK_SIZE_MAX (128u << 10)
#define VBLK_ID_BYTES 20u

enum vblk_status { VBLK_OK = 0, VBLK_IOERR = 1, VBLK_UNSUPP = 2 };

/* The values of VHC_REQ_*, and GET_ID, which is answered without the core. */
enum vblk_kind { VBLK_READ, VBLK_WRITE, VBLK_FLUSH, VBLK_DISCARD, VBLK_ZERO, VBLK_ZERO_UNMAP, VBLK_GET_ID };

struct vblk_limits {
    uint64_t capacity; /* sectors */
    uint32_t discard_max; /* sectors */
    uint32_t payload_max; /* bytes of a read or write, at most VBLK_MAX_PAYLOAD */
    uint32_t align_mem, align_io; /* what direct I/O asks of addresses and lengths, powers of two */
    bool read_only;
};

struct vblk_request {
    uint8_t kind; /* enum vblk_kind, valid with VBLK_OK only */
    bool aligned; /* every segment of the payload fits direct I/O */
    uint64_t sector;
    uint32_t sectors;
    uint32_t writable_bytes; /* data and status */
    uint8_t *status;         /* NULL: there is no place for an answer */
    struct iovec *payload;   /* within the chain that was given, cut to size */
    uint32_t payload_count, payload_bytes;
};

/* `readable` and `writable` are the two halves of a chain; both are changed. The result is what to answer: VBLK_OK: nothing yet, the
 * request is sound. */
enum vblk_status vblk_parse(const struct vblk_limits *limits, struct iovec *readable, uint32_t readable_count,
                            struct iovec *writable, uint32_t writable_count, struct vblk_request *request);

#endif
