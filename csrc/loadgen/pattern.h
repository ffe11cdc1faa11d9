/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What a verified write puts on the disk: each piece describes itself, so that a reader can tell a lost write, a misplaced one, an
 * old one and a torn one from each other. */
#ifndef VHOSTCACHE_LOADGEN_PATTERN_H
#define VHOSTCACHE_LOADGEN_PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Write `bytes` of content for disk offset `offset`, write number `sequence` of the run with this seed. */
void pattern_fill(uint8_t *piece, uint32_t bytes, uint64_t offset, uint32_t sequence, uint64_t seed);

/* True if the piece is what any write between `oldest` and `newest` would have put there; else `why` says what was found. */
bool pattern_check(const uint8_t *piece, uint32_t bytes, uint64_t offset, uint32_t oldest, uint32_t newest, uint64_t seed, char *why,
                   size_t why_bytes);

/* True if all of it is zero. */
bool pattern_is_zero(const uint8_t *piece, uint32_t bytes);

/* A step of a generator of random numbers: splitmix64. */
static inline uint64_t random_next(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

#endif
