/* The RAM tier's ring of entries, in the file that outlives the process: which slots hold acknowledged writes that the log may not.
 *
 * Invariant: an entry lies in the ring, and its slots hold their content, before `head` counts it; `head` moves once a request, before
 * the request is answered. Whoever reads the file after our death believes the entries from tail to head, and nothing else.
 * The ring never overflows: the core counts. Nothing here waits, and nothing is written to the file's header but head and tail. */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define HEAD_OFFSET 1024 /* a cache line each */
#define TAIL_OFFSET 1088

bool tier_create(struct volume *volume, char *error, size_t error_bytes)
{
    const vhc_volume_config *config = &volume->config;
    struct tier *tier = &volume->tier;
    struct stat status;
    if (config->tier_fd < 0)
        return true;
    uint64_t slab_end = config->tier_slab_offset + (uint64_t)config->slots * VHC_BLOCK;
    tier->bytes = config->tier_entries_offset + (uint64_t)config->tier_entries * sizeof(struct tier_entry);
    if (fstat(config->tier_fd, &status) < 0 || (uint64_t)status.st_size < slab_end || (uint64_t)status.st_size < tier->bytes) {
        snprintf(error, error_bytes, "the RAM-tier file is smaller than its contents");
        return false;
    }
    void *start = mmap(NULL, tier->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, config->tier_fd, 0);
    if (start == MAP_FAILED) {
        snprintf(error, error_bytes, "cannot map the RAM-tier file: %s", strerror(errno));
        return false;
    }
    tier->start = start;
    tier->entries = (struct tier_entry *)(tier->start + config->tier_entries_offset);
    tier->head = *(uint64_t *)(tier->start + HEAD_OFFSET);
    tier->tail = *(uint64_t *)(tier->start + TAIL_OFFSET);
    if (tier->tail > tier->head || tier->head - tier->tail > config->tier_entries) {
        snprintf(error, error_bytes, "the RAM-tier file counts more entries than it holds");
        tier_destroy(volume);
        return false;
    }
    return true;
}

void tier_destroy(struct volume *volume)
{
    if (volume->tier.start)
        munmap(volume->tier.start, volume->tier.bytes);
    volume->tier.start = NULL;
}

static void append(struct volume *volume, uint64_t seq, uint64_t extent, uint64_t slot)
{
    struct tier *tier = &volume->tier;
    assert(tier->start && tier->head - tier->tail < volume->config.tier_entries);
    tier->entries[tier->head++ % volume->config.tier_entries] = (struct tier_entry){seq, extent, slot};
}

static void publish_head(struct tier *tier)
{
    __atomic_store_n((uint64_t *)(tier->start + HEAD_OFFSET), tier->head, __ATOMIC_RELEASE);
}

/* `pairs`: an extent word and a slot each. */
void tier_publish(struct volume *volume, uint64_t seq, const uint64_t *pairs, uint32_t count)
{
    assert(count);
    for (uint32_t i = 0; i < count; i++) {
        assert(pairs[2 * i + 1] < volume->config.slots);
        append(volume, seq, pairs[2 * i], pairs[2 * i + 1]);
    }
    publish_head(&volume->tier);
}

void tier_publish_one(struct volume *volume, uint64_t block, uint32_t slot)
{
    append(volume, volume->tier.seq, block | 1ull << 40, slot); /* an extent of kind 0, data, and of one block */
    publish_head(&volume->tier);
}

void tier_retire(struct volume *volume, uint64_t tail)
{
    struct tier *tier = &volume->tier;
    assert(tier->start && tail >= tier->tail && tail <= tier->head);
    tier->tail = tail;
    __atomic_store_n((uint64_t *)(tier->start + TAIL_OFFSET), tail, __ATOMIC_RELEASE);
}
