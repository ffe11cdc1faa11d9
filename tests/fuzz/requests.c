/* Fuzz target: one virtio-blk request, cut into segments in any way, read-only or not, of any capacity.
 *
 * Each segment is a heap block of exactly its length, so that AddressSanitizer sees every access beyond it. Whatever is accepted
 * must lie within the capacity and have the payload that its segments have; pieces of it are then copied out and in. */
#include <sys/uio.h>

#include "fuzz.h"
#include "internal.h"

enum { SEGMENTS = 24, CONTENT = 64 };

static struct iovec out[SEGMENTS], in[SEGMENTS];
static void *blocks[2 * SEGMENTS];
static uint32_t block_count;

static uint32_t segment_bytes(void)
{
    static const uint32_t usual[] = {0, 1, 16, 17, 20, 511, 512, 513, 4096, 4097, 1024, 8, 15, 528, 19, 3};
    uint8_t choice = take8();
    return choice < 224 ? usual[choice % 16] : take16() % 16384;
}

static uint32_t make_segments(struct iovec *segments, const uint8_t *content, uint32_t content_bytes)
{
    uint32_t count = take8() % SEGMENTS;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t bytes = segment_bytes(), part = bytes < content_bytes ? bytes : content_bytes;
        uint8_t *block = malloc(bytes);
        if (part) {
            memcpy(block, content, part);
            content += part;
        }
        memset(block + part, (int)(i + 1), bytes - part);
        content_bytes -= part;
        segments[i] = (struct iovec){block, bytes};
        blocks[block_count++] = block;
    }
    return count;
}

static uint64_t total(const struct iovec *segments, uint32_t count)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < count; i++)
        bytes += segments[i].iov_len;
    return bytes;
}

/* Every segment of the payload has to lie in one of ours. */
static void check_segments(const struct vblk_request *request, const struct iovec *ours, uint32_t count)
{
    for (uint32_t i = 0; i < request->payload_count; i++) {
        const char *start = request->payload[i].iov_base;
        bool found = !request->payload[i].iov_len;
        for (uint32_t j = 0; j < count && !found; j++)
            found = start >= (char *)ours[j].iov_base && start + request->payload[i].iov_len <= (char *)ours[j].iov_base + ours[j].iov_len;
        REQUIRE(found);
    }
}

/* A piece of the payload is copied to memory of exactly its size, byte by byte to the right place, and back. */
static void copy(struct request *request)
{
    uint32_t offset = take32() % request->payload_bytes, bytes = 1 + take32() % (request->payload_bytes - offset);
    uint8_t *content = malloc(bytes);
    if (request->kind == VHC_REQ_WRITE) {
        request_copy_in(request, offset, bytes, content);
        uint32_t at = 0, left = bytes, skip = offset;
        for (uint32_t i = 0; left; i++) {
            uint32_t length = (uint32_t)request->payload[i].iov_len;
            if (skip >= length) {
                skip -= length;
                continue;
            }
            uint32_t part = length - skip < left ? length - skip : left;
            REQUIRE(memcmp((uint8_t *)request->payload[i].iov_base + skip, content + at, part) == 0);
            at += part;
            left -= part;
            skip = 0;
        }
    } else {
        memset(content, 0x55, bytes);
        request_copy_out(request, offset, bytes, content);
    }
    free(content);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct iovec given[2 * SEGMENTS];
    program = data;
    program_end = data + size;
    block_count = 0;
    uint8_t flags = take8();
    struct vblk_limits limits = {
        .capacity = flags & 1 ? take64() : 1000,
        .discard_max = flags & 2 ? take32() : 2048,
        .payload_max = VBLK_MAX_PAYLOAD,
        .align_mem = 1u << (flags >> 4 & 7),
        .align_io = flags & 8 ? 512 : 1,
        .read_only = flags & 4,
    };
    uint8_t content[CONTENT];
    uint32_t content_bytes = take8() % (CONTENT + 1);
    for (uint32_t i = 0; i < content_bytes; i++)
        content[i] = take8();
    if (flags & 128 && content_bytes >= 16) { /* a sector where sums overflow, which random bytes seldom are */
        uint64_t sector = -(uint64_t)take8();
        memcpy(content + 8, &sector, sizeof sector);
    }
    uint32_t out_count = make_segments(out, content, content_bytes), in_count = make_segments(in, NULL, 0);
    memcpy(given, out, sizeof(out));
    memcpy(given + out_count, in, in_count * sizeof(*in));
    uint64_t out_bytes = total(out, out_count), in_bytes = total(in, in_count);

    struct vblk_request parsed;
    enum vblk_status verdict = vblk_parse(&limits, out, out_count, in, in_count, &parsed);
    REQUIRE((parsed.status == NULL) == !in_bytes);
    if (parsed.status)
        *parsed.status = 0;
    REQUIRE(parsed.writable_bytes <= in_bytes);
    if (verdict == VBLK_OK) {
        struct request request = {.kind = parsed.kind, .payload = parsed.payload, .payload_count = parsed.payload_count, .payload_bytes = parsed.payload_bytes};
        bool moves = parsed.kind == VBLK_READ || parsed.kind == VBLK_WRITE;
        REQUIRE(in_bytes && parsed.kind <= VBLK_GET_ID && parsed.writable_bytes == in_bytes);
        REQUIRE(parsed.kind == VBLK_READ || parsed.kind == VBLK_FLUSH || parsed.kind == VBLK_GET_ID || !limits.read_only);
        check_segments(&parsed, given, out_count + in_count);
        if (parsed.kind != VBLK_FLUSH && parsed.kind != VBLK_GET_ID) {
            REQUIRE(parsed.sectors > 0);
            REQUIRE((unsigned __int128)parsed.sector + parsed.sectors <= limits.capacity);
        }
        if (moves) {
            REQUIRE(parsed.payload_bytes == (uint64_t)parsed.sectors * VBLK_SECTOR);
            REQUIRE(parsed.payload_bytes == total(parsed.payload, parsed.payload_count));
            REQUIRE(parsed.payload_bytes == (parsed.kind == VBLK_READ ? in_bytes - 1 : out_bytes - 16));
            for (uint32_t i = 0; parsed.aligned && i < parsed.payload_count; i++)
                REQUIRE(((uintptr_t)parsed.payload[i].iov_base & (limits.align_mem - 1)) == 0 &&
                        (parsed.payload[i].iov_len & (limits.align_io - 1)) == 0);
            for (int i = 0; i < 4; i++)
                copy(&request);
        } else if (parsed.kind == VBLK_GET_ID) {
            uint8_t serial[VBLK_ID_BYTES] = "serial";
            REQUIRE(parsed.payload_bytes <= VBLK_ID_BYTES && parsed.payload_bytes <= in_bytes - 1);
            request.kind = VHC_REQ_READ;
            request_copy_out(&request, 0, parsed.payload_bytes, serial);
        } else {
            REQUIRE(!parsed.payload_bytes && (parsed.kind == VBLK_FLUSH || parsed.sectors <= limits.discard_max));
        }
    }
    for (uint32_t i = 0; i < block_count; i++)
        free(blocks[i]);
    return 0;
}
