/* crc32c (Castagnoli), by the processor's own instruction (SSE4.2) or, on one without it, by tables.
 *
 * The instruction takes three cycles until its result can be used and can begin anew in each, so three blocks at a time cost what one
 * does. The tables are eight, of 256 entries: eight bytes a step. */
#include "crc32c.h"

#include <pthread.h>
#include <string.h>

#define POLYNOMIAL 0x82f63b78u /* 0x1edc6f41 reflected */

static uint32_t tables[8][256];
static bool instruction;
static pthread_once_t prepared = PTHREAD_ONCE_INIT;

static void prepare(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        tables[0][byte] = crc;
    }
    for (uint32_t byte = 0; byte < 256; byte++)
        for (int i = 1; i < 8; i++)
            tables[i][byte] = tables[i - 1][byte] >> 8 ^ tables[0][tables[i - 1][byte] & 255];
#ifdef __x86_64__
    instruction = __builtin_cpu_supports("sse4.2");
#endif
}

static uint32_t by_tables(uint32_t crc, const uint8_t *data, size_t bytes)
{
    for (; bytes >= 8; data += 8, bytes -= 8) {
        uint32_t low = crc ^ ((uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24);
        crc = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^ tables[4][low >> 24] ^ tables[3][data[4]] ^
              tables[2][data[5]] ^ tables[1][data[6]] ^ tables[0][data[7]];
    }
    for (; bytes; data++, bytes--)
        crc = crc >> 8 ^ tables[0][(crc ^ *data) & 255];
    return crc;
}

#ifdef __x86_64__
static inline uint64_t word_at(const uint8_t *data)
{
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t crc, const uint8_t *data, size_t bytes)
{
    uint64_t wide = crc;
    for (; bytes >= 8; data += 8, bytes -= 8)
        wide = __builtin_ia32_crc32di(wide, word_at(data));
    crc = (uint32_t)wide;
    for (; bytes; data++, bytes--)
        crc = __builtin_ia32_crc32qi(crc, *data);
    return crc;
}

__attribute__((target("sse4.2"))) static void three_blocks(const uint8_t *const *blocks, uint32_t *crcs)
{
    uint64_t a = UINT32_MAX, b = UINT32_MAX, c = UINT32_MAX;
    for (uint32_t i = 0; i < CRC32C_BLOCK; i += 8) {
        a = __builtin_ia32_crc32di(a, word_at(blocks[0] + i));
        b = __builtin_ia32_crc32di(b, word_at(blocks[1] + i));
        c = __builtin_ia32_crc32di(c, word_at(blocks[2] + i));
    }
    crcs[0] = ~(uint32_t)a;
    crcs[1] = ~(uint32_t)b;
    crcs[2] = ~(uint32_t)c;
}
#endif

uint32_t crc32c(uint32_t crc, const void *data, size_t bytes)
{
    pthread_once(&prepared, prepare);
#ifdef __x86_64__
    if (instruction)
        return ~by_instruction(~crc, data, bytes);
#endif
    return ~by_tables(~crc, data, bytes);
}

uint32_t crc32c_portable(uint32_t crc, const void *data, size_t bytes)
{
    pthread_once(&prepared, prepare);
    return ~by_tables(~crc, data, bytes);
}

void crc32c_blocks(const uint8_t *const *blocks, uint32_t count, uint32_t *crcs)
{
    uint32_t i = 0;
    pthread_once(&prepared, prepare);
#ifdef __x86_64__
    if (instruction)
        for (; i + 3 <= count; i += 3)
            three_blocks(blocks + i, crcs + i);
#endif
    for (; i < count; i++)
        crcs[i] = crc32c(0, blocks[i], CRC32C_BLOCK);
}
