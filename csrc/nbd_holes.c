/* A bitmap of what the server has said to be zeroes, and one of where it has said anything.
 *
 * Invariant: a range that is known to be zeroes has not been written, nor has any write to it been under way, since before the server was
 * asked. A *window* (64 MiB) is what is asked about at once: it counts its writes under way and has a version that each write
 * changes, so that an answer that a write has overtaken is not believed. Only this connection's client writes to the export. */
#include "nbd_holes.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define GRANULE_SHIFT 16u /* 64 KiB: two bits each, 4 MiB of memory for 1 TiB at most */
#define WINDOW_SHIFT 26u
#define GRANULE (1ull << GRANULE_SHIFT)
#define WINDOW (1ull << WINDOW_SHIFT)

struct window {
    uint32_t version, changes;
    bool asked;
};

struct holes {
    uint64_t size_bytes, granules, windows_count;
    uint8_t *known, *zero;
    struct window *windows;
};

static uint64_t end_of(uint64_t offset, uint64_t bytes, unsigned shift)
{
    return ((offset + bytes - 1) >> shift) + 1;
}

static bool get(const uint8_t *bits, uint64_t at)
{
    return bits[at >> 3] >> (at & 7) & 1;
}

static void set(uint8_t *bits, uint64_t at, bool value)
{
    uint8_t bit = (uint8_t)(1u << (at & 7));
    bits[at >> 3] = value ? bits[at >> 3] | bit : bits[at >> 3] & (uint8_t)~bit;
}

struct holes *holes_new(uint64_t size_bytes)
{
    struct holes *holes = calloc(1, sizeof *holes);
    if (!holes)
        return NULL;
    holes->size_bytes = size_bytes;
    holes->granules = end_of(0, size_bytes, GRANULE_SHIFT);
    holes->windows_count = end_of(0, size_bytes, WINDOW_SHIFT);
    holes->known = calloc(1, holes->granules / 8 + 1);
    holes->zero = calloc(1, holes->granules / 8 + 1);
    holes->windows = calloc(holes->windows_count, sizeof *holes->windows);
    if (!holes->known || !holes->zero || !holes->windows) {
        holes_free(holes);
        return NULL;
    }
    return holes;
}

void holes_free(struct holes *holes)
{
    if (!holes)
        return;
    free(holes->known);
    free(holes->zero);
    free(holes->windows);
    free(holes);
}

void holes_forget(struct holes *holes)
{
    memset(holes->known, 0, holes->granules / 8 + 1);
    memset(holes->zero, 0, holes->granules / 8 + 1);
    for (uint64_t i = 0; i < holes->windows_count; i++)
        holes->windows[i].version++;
}

static bool inside(const struct holes *holes, uint64_t offset, uint64_t bytes)
{
    return bytes && offset < holes->size_bytes && bytes <= holes->size_bytes - offset;
}

bool holes_cover(const struct holes *holes, uint64_t offset, uint64_t bytes)
{
    if (!inside(holes, offset, bytes)) /* the disk has grown meanwhile */
        return false;
    for (uint64_t i = offset >> GRANULE_SHIFT; i < end_of(offset, bytes, GRANULE_SHIFT); i++)
        if (!get(holes->zero, i))
            return false;
    return true;
}

static uint64_t clip(const struct holes *holes, uint64_t offset, uint64_t bytes)
{
    return offset >= holes->size_bytes ? 0 : bytes < holes->size_bytes - offset ? bytes : holes->size_bytes - offset;
}

void holes_change_begins(struct holes *holes, uint64_t offset, uint64_t bytes)
{
    if (!(bytes = clip(holes, offset, bytes)))
        return;
    for (uint64_t i = offset >> GRANULE_SHIFT; i < end_of(offset, bytes, GRANULE_SHIFT); i++) {
        set(holes->zero, i, false);
        set(holes->known, i, true); /* not worth asking */
    }
    for (uint64_t i = offset >> WINDOW_SHIFT; i < end_of(offset, bytes, WINDOW_SHIFT); i++) {
        holes->windows[i].changes++;
        holes->windows[i].version++;
    }
}

void holes_change_ends(struct holes *holes, uint64_t offset, uint64_t bytes)
{
    if (!(bytes = clip(holes, offset, bytes)))
        return;
    for (uint64_t i = offset >> WINDOW_SHIFT; i < end_of(offset, bytes, WINDOW_SHIFT); i++) {
        assert(holes->windows[i].changes);
        holes->windows[i].changes--;
        holes->windows[i].version++;
    }
}

bool holes_ask(struct holes *holes, uint64_t offset, uint64_t bytes, struct question *question)
{
    if (!inside(holes, offset, bytes))
        return false;
    struct window *window = &holes->windows[offset >> WINDOW_SHIFT];
    uint64_t first = offset >> GRANULE_SHIFT, end = ((offset >> WINDOW_SHIFT) + 1) << WINDOW_SHIFT;
    if (window->asked || window->changes || get(holes->known, first))
        return false;
    if (end > holes->size_bytes)
        end = holes->size_bytes;
    window->asked = true;
    *question = (struct question){first << GRANULE_SHIFT, (uint32_t)(end - (first << GRANULE_SHIFT)), window->version};
    return true;
}

void holes_answer(struct holes *holes, const struct question *question, uint64_t offset, uint64_t bytes, bool zeroes)
{
    uint64_t end = question->offset + question->bytes;
    if (holes->windows[question->offset >> WINDOW_SHIFT].version != question->version || offset >= end)
        return;
    bytes = bytes < end - offset ? bytes : end - offset;
    uint64_t stop = offset + bytes;
    /* Whole granules only; the last of the export may be short. */
    for (uint64_t i = (offset + GRANULE - 1) >> GRANULE_SHIFT; i < holes->granules; i++) {
        uint64_t granule_end = (i + 1) << GRANULE_SHIFT < holes->size_bytes ? (i + 1) << GRANULE_SHIFT : holes->size_bytes;
        if (granule_end > stop)
            break;
        set(holes->known, i, true);
        set(holes->zero, i, zeroes);
    }
}

void holes_answered(struct holes *holes, const struct question *question, bool good)
{
    struct window *window = &holes->windows[question->offset >> WINDOW_SHIFT];
    window->asked = false;
    /* Whatever it has said: not about the same place again. */
    if (good && window->version == question->version)
        set(holes->known, question->offset >> GRANULE_SHIFT, true);
}
