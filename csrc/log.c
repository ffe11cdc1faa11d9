/* The log's part in the engine: records composed and written, ring blocks read and verified, superblocks written.
 *
 * Owns the crc table (a crc32c for each block of the ring) and the crc of the header that was composed last. Invariant: every checksum
 * is computed over memory that is ours and that nobody changes: slots of the slab, or a bounce buffer. A block that is read counts only
 * when it has the crc that stands in the table for its place. Decides nothing: where a record lies, and when it is written, is the
 * core's business (docs/log-format.md has the format). */
#include "io.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "crc32c.h"
#include "syncer.h"

#define RING_OFFSET (1u << 20)
#define HEADER_BYTES 64u /* before the extents */
#define MAX_HEADER_BLOCKS 2u
_Static_assert((MAX_HEADER_BLOCKS * VHC_BLOCK - HEADER_BYTES) / sizeof(uint32_t) + MAX_HEADER_BLOCKS <= LOG_MAX_SLOTS, "any record has room");
#define BATCH 24u /* blocks whose crcs are computed in one go */

/* The header's words, by number, and what stands in the halves of some. */
enum { WORD_ADDRESS = 3, WORD_BLOCKS = 4, WORD_COUNTS = 5, WORD_CRCS = 7, HEADER_WORDS = 8 };
#define PREVIOUS_CRC_OFFSET 56u
#define HEADER_CRC_OFFSET 60u

static uint64_t table_bytes(const struct volume *volume)
{
    return (volume->config.ring_bytes + volume->config.store_bytes) / VHC_BLOCK * sizeof(uint32_t);
}

bool log_create(struct volume *volume, char *error, size_t error_bytes)
{
    if (volume->config.cache_fd < 0)
        return true;
    size_t bytes = table_bytes(volume);
    void *crcs = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (crcs == MAP_FAILED) {
        snprintf(error, error_bytes, "cannot allocate %zu MiB for the log's checksums: %s", bytes >> 20, strerror(errno));
        return false;
    }
    madvise(crcs, bytes, MADV_DONTDUMP);
    volume->log.crcs = crcs;
    volume->log.syncer = syncer_create(volume->engine, volume->config.cache_fd, error, error_bytes);
    return volume->log.syncer != NULL;
}

void log_destroy(struct volume *volume)
{
    if (volume->log.syncer)
        syncer_destroy(volume->log.syncer);
    volume->log.syncer = NULL;
    if (volume->log.crcs)
        munmap(volume->log.crcs, table_bytes(volume));
    volume->log.crcs = NULL;
}

void vhc_log_start(vhc_engine *engine, uint32_t number, uint32_t previous_header_crc)
{
    assert(number < engine->volumes_count && engine->volumes[number]->log.crcs);
    engine->volumes[number]->log.previous_crc = previous_header_crc;
}

uint32_t *vhc_log_crcs(vhc_engine *engine, uint32_t number)
{
    assert(number < engine->volumes_count);
    return engine->volumes[number]->log.crcs;
}

uint32_t vhc_crc32c(const void *data, size_t bytes, int portable)
{
    return portable ? crc32c_portable(0, data, bytes) : crc32c(0, data, bytes);
}

/* The place in the crc table of `blocks` blocks at `offset` of the cache file, which lie in the ring or in the read cache in one piece. */
static uint32_t *crcs_at(const struct volume *volume, uint64_t offset, uint64_t blocks)
{
    assert(volume->log.crcs && offset >= RING_OFFSET && offset % VHC_BLOCK == 0);
    uint64_t position = (offset - RING_OFFSET) / VHC_BLOCK, ring_blocks = volume->config.ring_bytes / VHC_BLOCK;
    if (position < ring_blocks)
        assert(blocks <= ring_blocks - position);
    else
        assert(position - ring_blocks + blocks <= volume->config.store_bytes / VHC_BLOCK);
    return volume->log.crcs + position;
}

/* A field of a header whose blocks lie in two slots that are not neighbours. Aligned fields never lie across the boundary. */
static uint8_t *header_at(const struct volume *volume, const uint64_t *headers, uint32_t offset)
{
    return slab_slot(volume, (uint32_t)headers[offset / VHC_BLOCK]) + offset % VHC_BLOCK;
}

static void put_crc(const struct volume *volume, const uint64_t *headers, uint32_t offset, uint32_t crc)
{
    memcpy(header_at(volume, headers, offset), &crc, sizeof crc);
}

static void check_words(const struct volume *volume, const struct log_record *record)
{
    const uint64_t *words = record->words;
    uint64_t ring_blocks = volume->config.ring_bytes / VHC_BLOCK;
    assert(record->words_count >= HEADER_WORDS && record->words_count == HEADER_WORDS + (uint32_t)words[WORD_COUNTS] && words[WORD_CRCS] == 0);
    assert(record->offset == RING_OFFSET + words[WORD_ADDRESS] % ring_blocks * VHC_BLOCK);
    assert((uint32_t)words[WORD_BLOCKS] == record->header_blocks);
    assert(words[WORD_BLOCKS] >> 32 == record->payload_blocks);
    assert((uint64_t)record->words_count * 8 + (uint64_t)record->payload_blocks * sizeof(uint32_t) <= (uint64_t)record->header_blocks * VHC_BLOCK);
}

/* The words, the payload's crcs behind them, then the two crcs of the chain of headers. */
static void compose(struct volume *volume, const struct log_record *record)
{
    const uint64_t *headers = record->slots, *payload = record->slots + record->header_blocks;
    uint32_t *table = crcs_at(volume, record->offset, record->header_blocks + record->payload_blocks) + record->header_blocks;
    check_words(volume, record);
    for (uint32_t i = 0; i < record->header_blocks; i++)
        memset(slab_slot(volume, (uint32_t)headers[i]), 0, VHC_BLOCK);
    for (uint32_t i = 0; i < record->words_count; i++)
        memcpy(header_at(volume, headers, i * 8), &record->words[i], 8);
    for (uint32_t done = 0; done < record->payload_blocks;) {
        const uint8_t *blocks[BATCH];
        uint32_t count = 0;
        for (; count < BATCH && done + count < record->payload_blocks; count++)
            blocks[count] = slab_slot(volume, (uint32_t)payload[done + count]);
        crc32c_blocks(blocks, count, table + done);
        for (; count; count--, done++)
            put_crc(volume, headers, record->words_count * 8 + done * (uint32_t)sizeof(uint32_t), table[done]);
    }
    put_crc(volume, headers, PREVIOUS_CRC_OFFSET, volume->log.previous_crc);
    uint32_t crc = 0;
    for (uint32_t i = 0; i < record->header_blocks; i++)
        crc = crc32c(crc, slab_slot(volume, (uint32_t)headers[i]), VHC_BLOCK);
    put_crc(volume, headers, HEADER_CRC_OFFSET, crc);
    volume->log.previous_crc = crc;
}

void log_write(struct volume *volume, uint32_t group, const struct log_record *record, bool repeat, bool durable)
{
    uint32_t blocks = record->header_blocks + record->payload_blocks;
    assert(record->header_blocks >= 1 && record->header_blocks <= MAX_HEADER_BLOCKS);
    crcs_at(volume, record->offset, blocks);
    for (uint32_t i = 0; i < blocks; i++)
        assert(record->slots[i] >= (i < record->header_blocks ? VHC_FIRST_SLOT : 1u) && record->slots[i] < volume->config.slots);
    if (repeat)
        assert(!record->words_count);
    else
        compose(volume, record);
    io_record(volume, group, record->offset, record->slots, blocks, durable);
}

void log_store(struct volume *volume, uint32_t group, uint64_t offset, const uint64_t *slots, uint32_t count)
{
    assert(offset >= RING_OFFSET + volume->config.ring_bytes);
    uint32_t *table = crcs_at(volume, offset, count);
    for (uint32_t done = 0; done < count;) {
        const uint8_t *blocks[BATCH];
        uint32_t some = 0;
        for (; some < BATCH && done + some < count; some++) {
            assert(slots[done + some] >= 1 && slots[done + some] < volume->config.slots);
            blocks[some] = slab_slot(volume, (uint32_t)slots[done + some]);
        }
        crc32c_blocks(blocks, some, table + done);
        done += some;
    }
    io_slots(volume, IO_CACHE, IO_WRITE, group, offset, (uint64_t)count * VHC_BLOCK, slots, count, 0);
}

void log_read(struct volume *volume, uint32_t group, uint64_t offset, const uint64_t *slots, uint32_t count)
{
    crcs_at(volume, offset, count);
    io_slots(volume, IO_CACHE, IO_READ, group, offset, (uint64_t)count * VHC_BLOCK, slots, count, 0);
}

void log_read_direct(struct request *request, uint32_t group, uint32_t payload_offset, uint64_t offset, uint64_t bytes)
{
    assert(bytes % VHC_BLOCK == 0);
    crcs_at(request->connection->volume, offset, bytes / VHC_BLOCK);
    io_direct(request, IO_CACHE, IO_READ, group, payload_offset, offset, bytes);
}

void log_superblock(struct volume *volume, uint32_t group, uint64_t offset, const uint64_t *words, uint32_t count)
{
    assert(volume->log.crcs && offset % VHC_BLOCK == 0 && offset < RING_OFFSET && count <= VHC_BLOCK / 8);
    uint8_t block[VHC_BLOCK] = {0};
    memcpy(block, words, (size_t)count * 8);
    io_superblock(volume, group, offset, block);
}

uint32_t log_wrong_blocks(const struct io *io)
{
    const struct volume *volume = io->volume;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < io->whole_count; i++)
        bytes += io->whole[i].iov_len;
    const uint32_t *table = crcs_at(volume, io->whole_offset, bytes / VHC_BLOCK);
    uint32_t wrong = 0;
    for (uint32_t i = 0; i < io->whole_count; i++) {
        const uint8_t *next = io->whole[i].iov_base;
        for (uint64_t left = io->whole[i].iov_len / VHC_BLOCK; left;) {
            const uint8_t *blocks[BATCH];
            uint32_t crcs[BATCH], count = 0;
            for (; count < BATCH && left; count++, left--, next += VHC_BLOCK)
                blocks[count] = next;
            crc32c_blocks(blocks, count, crcs);
            for (uint32_t j = 0; j < count; j++)
                wrong += crcs[j] != *table++;
        }
    }
    return wrong;
}
