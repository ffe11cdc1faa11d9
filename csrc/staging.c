/* The youngest fitting one first: that is the one the processor's cache still has. Small ones are left to malloc(), which is as good
 * at them; so are those much larger than what is wanted, for they would be held for little. */
#include "staging.h"

#include <stdlib.h>

#define SMALL_BYTES (64u << 10)
#define KEPT_BYTES (16ull << 20)

void *staging_take(struct staging *staging, uint32_t bytes, uint32_t *capacity)
{
    for (uint32_t i = staging->count; i-- && bytes > SMALL_BYTES;) {
        uint32_t has = staging->kept[i].bytes;
        if (has < bytes || has / 2 > bytes)
            continue;
        void *memory = staging->kept[i].memory;
        for (staging->count--; i < staging->count; i++)
            staging->kept[i] = staging->kept[i + 1];
        staging->kept_bytes -= has;
        *capacity = has;
        return memory;
    }
    void *memory = malloc(bytes);
    *capacity = memory ? bytes : 0;
    return memory;
}

void staging_give(struct staging *staging, void *memory, uint32_t capacity)
{
    if (capacity <= SMALL_BYTES || capacity > KEPT_BYTES - staging->kept_bytes || staging->count == STAGING_BUFFERS) {
        free(memory);
        return;
    }
    staging->kept[staging->count].memory = memory;
    staging->kept[staging->count++].bytes = capacity;
    staging->kept_bytes += capacity;
}

void staging_clear(struct staging *staging)
{
    while (staging->count)
        free(staging->kept[--staging->count].memory);
    staging->kept_bytes = 0;
}
