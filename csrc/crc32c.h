/* crc32c (Castagnoli), as the log's records carry it. Knows nothing of the engine. */
#ifndef VHC_CRC32C_H
#define VHC_CRC32C_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CRC32C_BLOCK 4096u

/* Of `bytes` that follow others whose crc is `crc` (0: none). */
uint32_t crc32c(uint32_t crc, const void *data, size_t bytes);
/* The same without the processor's help. */
uint32_t crc32c_portable(uint32_t crc, const void *data, size_t bytes);
/* Of `count` blocks, each for itself. */
void crc32c_blocks(const uint8_t *const *blocks, uint32_t count, uint32_t *crcs);

#endif
