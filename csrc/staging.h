/* Buffers that are used again: what is taken and given back all the time needs neither new pages nor cold ones. */
#ifndef VHC_STAGING_H
#define VHC_STAGING_H

#include <stdint.h>

#define STAGING_BUFFERS 16u

/* All zero: nothing is kept. */
struct staging {
    struct {
        void *memory;
        uint32_t bytes;
    } kept[STAGING_BUFFERS];
    uint32_t count;
    uint64_t kept_bytes;
};

/* At least so many bytes, of any content; NULL: there is no memory now. `*capacity`: give it back with this; or 0. */
void *staging_take(struct staging *staging, uint32_t bytes, uint32_t *capacity);
void staging_give(struct staging *staging, void *memory, uint32_t capacity);
void staging_clear(struct staging *staging);

#endif
