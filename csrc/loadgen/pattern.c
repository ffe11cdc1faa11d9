/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The content of verified writes, and crc32c (the processor's instruction where there is one, a table elsewhere). */
#include "pattern.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "loadgen.h"

#define MAGIC 0x76686362656e6368u /* "vhcbench" */

typedef struct {
    uint64_t magic, offset, seed;
    uint32_t sequence, crc; /* the crc is over the whole piece, with this field zero */
} piece_header;

static uint32_t crc_table[256];

static void __attribute__((constructor)) make_crc_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;

        for (int bit = 0; bit < 8; bit++) {
            crc = crc & 1 ? crc >> 1 ^ 0x82f63b78u : crc >> 1;
        }
        crc_table[i] = crc;
    }
}

static uint32_t crc_by_table(uint32_t crc, const uint8_t *data, size_t bytes)
{
    while (bytes--) {
        crc = crc >> 8 ^ crc_table[(crc ^ *data++) & 0xff];
    }
    return crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t crc_by_instruction(uint32_t crc, const uint8_t *data, size_t bytes)
{
    uint64_t wide = crc;

    for (; bytes >= 8; bytes -= 8, data += 8) {
        uint64_t word;

        memcpy(&word, data, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = (uint32_t)wide;
    while (bytes--) {
        crc = __builtin_ia32_crc32qi(crc, *data++);
    }
    return crc;
}
#endif

uint32_t lg_crc32c(uint32_t crc, const void *data, size_t bytes)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("sse4.2")) {
        return ~crc_by_instruction(~crc, data, bytes);
    }
#endif
    return ~crc_by_table(~crc, data, bytes);
}

void pattern_fill(uint8_t *piece, uint32_t bytes, uint64_t offset, uint32_t sequence, uint64_t seed)
{
    piece_header header = {.magic = MAGIC, .offset = offset, .seed = seed, .sequence = sequence};
    uint64_t state = seed ^ offset << 20 ^ sequence;

    for (uint32_t at = sizeof header; at < bytes; at += 8) {
        uint64_t word = random_next(&state);

        memcpy(piece + at, &word, 8);
    }
    memcpy(piece, &header, sizeof header);
    header.crc = lg_crc32c(0, piece, bytes);
    memcpy(piece, &header, sizeof header);
}

bool pattern_is_zero(const uint8_t *piece, uint32_t bytes)
{
    return piece[0] == 0 && memcmp(piece, piece + 1, bytes - 1) == 0;
}

/* The crc over the piece as if its crc field were zero. The buffer is shared with the server, so it is not changed here. */
static uint32_t piece_crc(const uint8_t *piece, uint32_t bytes, piece_header header)
{
    header.crc = 0;
    return lg_crc32c(lg_crc32c(0, &header, sizeof header), piece + sizeof header, bytes - sizeof header);
}

bool pattern_check(const uint8_t *piece, uint32_t bytes, uint64_t offset, uint32_t oldest, uint32_t newest, uint64_t seed, char *why,
                   size_t why_bytes)
{
    piece_header found;
    uint32_t crc;

    memcpy(&found, piece, sizeof found);
    crc = piece_crc(piece, bytes, found);
    if (found.magic == MAGIC && found.crc == crc && found.offset == offset && found.seed == seed && found.sequence >= oldest &&
        found.sequence <= newest) {
        return true;
    }
    if (pattern_is_zero(piece, bytes)) {
        snprintf(why, why_bytes, "found zeroes");
    } else if (found.magic != MAGIC) {
        snprintf(why, why_bytes, "found data that is not ours (first bytes %016" PRIx64 ")", found.magic);
    } else if (found.crc != crc) {
        snprintf(why, why_bytes, "found a torn piece (write %u of offset %" PRIu64 ", crc32c %08x in it, %08x over it)", found.sequence,
                 found.offset, found.crc, crc);
    } else if (found.seed != seed) {
        snprintf(why, why_bytes, "found write %u of offset %" PRIu64 " of another run (seed %" PRIu64 ")", found.sequence, found.offset,
                 found.seed);
    } else {
        snprintf(why, why_bytes, "found write %u of offset %" PRIu64, found.sequence, found.offset);
    }
    return false;
}
