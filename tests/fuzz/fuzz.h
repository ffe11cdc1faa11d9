/* What the fuzz targets share: a program of bytes, read from the front; past its end everything is zero. */
#ifndef VHC_FUZZ_H
#define VHC_FUZZ_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A finding: libFuzzer keeps the input. */
#define FINDING(...)                      \
    do {                                  \
        fprintf(stderr, "finding: ");     \
        fprintf(stderr, __VA_ARGS__);     \
        fprintf(stderr, "\n");            \
        abort();                          \
    } while (0)
#define REQUIRE(condition)                                                \
    do {                                                                  \
        if (!(condition))                                                 \
            FINDING("%s:%d: %s does not hold", __FILE__, __LINE__, #condition); \
    } while (0)

static const uint8_t *program, *program_end;

static inline bool program_left(void)
{
    return program < program_end;
}

static inline uint8_t take8(void)
{
    return program < program_end ? *program++ : 0;
}

static inline uint16_t take16(void)
{
    uint16_t low = take8();
    return (uint16_t)(low | take8() << 8);
}

static inline uint32_t take32(void)
{
    uint32_t low = take16();
    return low | (uint32_t)take16() << 16;
}

static inline uint64_t take64(void)
{
    uint64_t low = take32();
    return low | (uint64_t)take32() << 32;
}

#endif
