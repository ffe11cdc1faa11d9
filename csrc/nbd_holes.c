/* A bitmap of what the server has said to be zeroes, and one of where it has said anything.
 *
 * Invariant: a range that is known to be zeroes has not been written, nor has any write to it been under way, since before the server was
 * asked. A *window* (64 MiB) counts its writes under way and remembers when it was changed last, so that an answer that a write has
 * overtaken is not believed. Only this connection's client writes to the export.
 *
 * A question may cost the server a look at all that follows (SEEK_HOLE in a file without holes), so few are asked: each reaches farther
 * while the answers are that all is the same, and what an answer says of the space behind the question is taken too. */
#include "nbd_holes.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define GRANULE_SHIFT 16u /* 64 KiB: two bits each, 4 MiB of memory for 1 TiB at most */
#define WINDOW_SHIFT 26u
#define GRANULE (1ull << GRANULE_SHIFT)
#define WINDOW (1ull << WINDOW_SHIFT)
#define WINDOW_GRANULES (WINDOW >> GRANULE_SHIFT)
#define REACH_MAX (1ull << 30) /* of a question */

struct window {
    uint64_t changed; /* the moment of the last change; see `now` */
    uint32_t changes; /* under way */
    bool asked;
};

struct holes {
    uint64_t size_bytes, granules, windows_count;
    uint64_t now;   /* counts changes, their beginnings and their ends */
    uint64_t reach, reach_max; /* of the next question, in bytes */
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
    holes->reach = WINDOW;
    holes->reach_max = REACH_MAX;
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
    holes->now++;
    for (uint64_t i = 0; i < holes->windows_count; i++)
        holes->windows[i].changed = holes->now;
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
    holes->now++;
    for (uint64_t i = offset >> WINDOW_SHIFT; i < end_of(offset, bytes, WINDOW_SHIFT); i++) {
        holes->windows[i].changes++;
        holes->windows[i].changed = holes->now;
    }
}

void holes_change_ends(struct holes *holes, uint64_t offset, uint64_t bytes)
{
    if (!(bytes = clip(holes, offset, bytes)))
        return;
    holes->now++;
    for (uint64_t i = offset >> WINDOW_SHIFT; i < end_of(offset, bytes, WINDOW_SHIFT); i++) {
        assert(holes->windows[i].changes);
        holes->windows[i].changes--;
        holes->windows[i].changed = holes->now;
    }
}

static void set_asked(struct holes *holes, const struct question *question, bool asked)
{
    for (uint64_t i = question->offset >> WINDOW_SHIFT; i < end_of(question->offset, question->bytes, WINDOW_SHIFT); i++)
        holes->windows[i].asked = asked;
}

bool holes_ask(struct holes *holes, uint64_t offset, uint64_t bytes, struct question *question)
{
    if (!inside(holes, offset, bytes))
        return false;
    struct window *window = &holes->windows[offset >> WINDOW_SHIFT];
    uint64_t first = offset >> GRANULE_SHIFT, end = ((offset >> WINDOW_SHIFT) + 1) << WINDOW_SHIFT;
    if (window->asked || window->changes || get(holes->known, first))
        return false;
    uint64_t start = first << GRANULE_SHIFT, most = start + holes->reach;
    while (end < most && end < holes->size_bytes && !holes->windows[end >> WINDOW_SHIFT].asked && !get(holes->known, end >> GRANULE_SHIFT))
        end += WINDOW;
    if (end > holes->size_bytes)
        end = holes->size_bytes;
    *question = (struct question){start, (uint32_t)(end - start), holes->now};
    set_asked(holes, question, true);
    return true;
}

static void learn(struct holes *holes, uint64_t first, uint64_t end, bool zeroes)
{
    for (uint64_t i = first; i < end;) {
        if (!(i & 7) && end - i >= 8) {
            memset(holes->known + (i >> 3), 0xff, (end - i) >> 3);
            memset(holes->zero + (i >> 3), zeroes ? 0xff : 0, (end - i) >> 3);
            i = end & ~7ull;
        } else {
            set(holes->known, i, true);
            set(holes->zero, i++, zeroes);
        }
    }
}

void holes_answer(struct holes *holes, const struct question *question, uint64_t offset, uint64_t bytes, bool zeroes)
{
    if (!(bytes = clip(holes, offset, bytes)))
        return;
    uint64_t stop = offset + bytes;
    if (offset == question->offset && bytes >= question->bytes)
        holes->reach = holes->reach < holes->reach_max ? 2 * holes->reach : holes->reach_max;
    else
        holes->reach = WINDOW;
    /* Whole granules only; the last of the export may be short. */
    uint64_t first = (offset + GRANULE - 1) >> GRANULE_SHIFT, end = stop == holes->size_bytes ? holes->granules : stop >> GRANULE_SHIFT;
    while (first < end) {
        const struct window *window = &holes->windows[first / WINDOW_GRANULES];
        uint64_t next = (first / WINDOW_GRANULES + 1) * WINDOW_GRANULES;
        if (next > end)
            next = end;
        if (!window->changes && window->changed <= question->asked_at)
            learn(holes, first, next, zeroes);
        first = next;
    }
}

bool holes_ask_less(struct holes *holes, const struct question *question)
{
    holes->reach = holes->reach_max = WINDOW;
    return question->bytes > WINDOW;
}

void holes_answered(struct holes *holes, const struct question *question, bool good)
{
    set_asked(holes, question, false);
    /* Whatever it has said: not about the same place again. */
    if (good && holes->windows[question->offset >> WINDOW_SHIFT].changed <= question->asked_at)
        set(holes->known, question->offset >> GRANULE_SHIFT, true);
}
