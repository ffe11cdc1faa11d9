/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Split virtqueue, driver's side (virtio 1.1, section 2.6). */
#include "ring.h"

/* With EVENT_IDX the event fields lie behind the other's ring. */
static uint16_t *used_event(const ring *r)
{
    return &r->available->ring[r->size];
}

static uint16_t *available_event(const ring *r)
{
    return (uint16_t *)&r->used->ring[r->size];
}

void ring_init(ring *r, uint32_t size, bool event_idx, uint8_t *descriptors, uint8_t *available, uint8_t *used)
{
    *r = (ring){
        .size = size,
        .event_idx = event_idx,
        .descriptors = (struct vring_desc *)descriptors,
        .available = (struct vring_avail *)available,
        .used = (struct vring_used *)used,
    };
}

void ring_add(ring *r, uint16_t head)
{
    r->available->ring[r->next_available++ & (r->size - 1)] = head;
}

bool ring_publish(ring *r)
{
    uint16_t before = r->published, after = r->next_available;

    if (before == after) {
        return false;
    }
    __atomic_store_n(&r->available->idx, after, __ATOMIC_RELEASE);
    r->published = after;
    /* The device publishes what it wants and then looks at our index; we do it the other way round. One of us must see the other. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (r->event_idx) {
        return vring_need_event(__atomic_load_n(available_event(r), __ATOMIC_RELAXED), after, before);
    }
    return !(__atomic_load_n(&r->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY);
}

void ring_interrupts(ring *r, bool wanted)
{
    if (r->event_idx) {
        /* "None" is an index that lies as far ahead as an index can. */
        __atomic_store_n(used_event(r), (uint16_t)(r->last_used + (wanted ? 0 : 0x8000)), __ATOMIC_RELAXED);
    } else {
        __atomic_store_n(&r->available->flags, wanted ? 0 : VRING_AVAIL_F_NO_INTERRUPT, __ATOMIC_RELAXED);
    }
    if (wanted) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }
}

uint32_t ring_take(ring *r)
{
    return __atomic_load_n(&r->used->ring[r->last_used++ & (r->size - 1)].id, __ATOMIC_RELAXED);
}
