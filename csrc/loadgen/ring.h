/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The driver's side of a split virtqueue. It knows descriptors by the head of their chain only; what a chain says is the caller's. */
#ifndef VHOSTCACHE_LOADGEN_RING_H
#define VHOSTCACHE_LOADGEN_RING_H

#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct {
    uint32_t size;
    bool event_idx;
    struct vring_desc *descriptors;
    struct vring_avail *available;
    struct vring_used *used;
    uint16_t next_available; /* ours, not yet all published */
    uint16_t published;
    uint16_t last_used;
} ring;

void ring_init(ring *r, uint32_t size, bool event_idx, uint8_t *descriptors, uint8_t *available, uint8_t *used);
/* Put a chain into the available ring. The device sees it at the next ring_publish(). */
void ring_add(ring *r, uint16_t head);
/* Let the device see what was added. True if it wants a kick for that. */
bool ring_publish(ring *r);
/* Ask for an interrupt at the next completion, or for none. After asking, look at ring_completed() again. */
void ring_interrupts(ring *r, bool wanted);
/* Completions waiting, as the device says: to be checked against what is in flight. */
static inline uint16_t ring_completed(const ring *r)
{
    return (uint16_t)(__atomic_load_n(&r->used->idx, __ATOMIC_ACQUIRE) - r->last_used);
}
/* The chain completed next, as the device says. Only if ring_completed(). */
uint32_t ring_take(ring *r);

#endif
