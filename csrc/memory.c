/* The front-end's memory: the table of regions, and the log of the pages that we dirty while it migrates.
 *
 * libvhost-user's own handling is not used for these messages: it trusts numbers and sizes, forgets a failed mmap() half-way (and
 * later unmaps what is not its own), and asserts on a log that is too small. The table is kept where the library looks for it. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Is the file large enough? One that is not regular (a device) says nothing about its size, and must be believed. */
static bool file_holds(int fd, uint64_t bytes)
{
    struct stat status;
    return fstat(fd, &status) == 0 && (!S_ISREG(status.st_mode) || (uint64_t)status.st_size >= bytes);
}

static bool sound(const VhostUserMemoryRegion *region, uint64_t *map_bytes)
{
    uint64_t end;
    return region->memory_size && !__builtin_add_overflow(region->memory_size, region->mmap_offset, map_bytes) &&
           *map_bytes <= INT64_MAX && !__builtin_add_overflow(region->guest_phys_addr, region->memory_size, &end) &&
           end <= INT64_MAX && !__builtin_add_overflow(region->userspace_addr, region->memory_size, &end);
}

/* The offset is not given to mmap(): with huge pages it is not aligned as that would need. */
static bool map_region(struct connection *connection, const VhostUserMemoryRegion *region, int fd, VuDevRegion *result)
{
    uint64_t bytes;
    if (!sound(region, &bytes)) {
        connection_close(connection, 1, "a memory region of impossible size or address");
        return false;
    }
    if (!file_holds(fd, bytes)) {
        connection_close(connection, 1, "a memory region larger than its file");
        return false;
    }
    void *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (address == MAP_FAILED) {
        connection_close(connection, 1, "a memory region cannot be mapped: %s", strerror(errno));
        return false;
    }
    if (!sigbus_watch(address, bytes, &connection->bus_error)) {
        munmap(address, bytes);
        connection_close(connection, 1, "too many memory regions in this process");
        return false;
    }
    madvise(address, bytes, MADV_DONTDUMP);
    *result = (VuDevRegion){.gpa = region->guest_phys_addr, .size = region->memory_size, .qva = region->userspace_addr,
                            .mmap_offset = region->mmap_offset, .mmap_addr = (uintptr_t)address};
    return true;
}

static void unmap_region(const VuDevRegion *region)
{
    sigbus_forget((void *)(uintptr_t)region->mmap_addr);
    munmap((void *)(uintptr_t)region->mmap_addr, region->size + region->mmap_offset);
}

static bool overlaps(const VuDevRegion *regions, uint32_t count, const VuDevRegion *region)
{
    for (uint32_t i = 0; i < count; i++)
        if (region->gpa < regions[i].gpa + regions[i].size && regions[i].gpa < region->gpa + region->size)
            return true;
    return false;
}

/* The rings lie elsewhere now, all of them, before anything else looks at one. One that lies nowhere any more must not be in use. */
static bool remap_rings(struct connection *connection)
{
    const struct queue *lost = NULL;
    for (uint32_t i = 0; i < connection->dev.max_queues; i++) {
        struct queue *queue = &connection->queues[i];
        if (queue->vq->vring.desc && !queue_map(connection, queue) && queue->running)
            lost = queue;
    }
    if (lost)
        connection_close(connection, 1, "the memory of running queue %u has gone", lost->index);
    return !lost;
}

bool memory_set_table(struct connection *connection, const VhostUserMsg *message)
{
    VuDev *dev = &connection->dev;
    VhostUserMemory memory = message->payload.memory;
    VuDevRegion regions[VHOST_MEMORY_BASELINE_NREGIONS];
    uint32_t mapped = 0;
    for (; mapped < memory.nregions; mapped++) {
        VhostUserMemoryRegion region = memory.regions[mapped];
        if (!map_region(connection, &region, message->fds[mapped], &regions[mapped]))
            break;
        if (overlaps(regions, mapped, &regions[mapped])) {
            unmap_region(&regions[mapped]);
            connection_close(connection, 1, "memory regions overlap");
            break;
        }
    }
    if (mapped < memory.nregions) {
        while (mapped)
            unmap_region(&regions[--mapped]);
        return false;
    }
    for (uint32_t i = 0; i < dev->nregions; i++)
        unmap_region(&dev->regions[i]);
    memcpy(dev->regions, regions, mapped * sizeof regions[0]);
    dev->nregions = mapped;
    return remap_rings(connection);
}

bool memory_add(struct connection *connection, const VhostUserMsg *message)
{
    VuDev *dev = &connection->dev;
    VhostUserMemoryRegion given = message->payload.memreg.region;
    VuDevRegion region;
    if (dev->nregions == VHOST_USER_MAX_RAM_SLOTS) {
        connection_close(connection, 1, "more than %d memory regions", VHOST_USER_MAX_RAM_SLOTS);
        return false;
    }
    if (!map_region(connection, &given, message->fds[0], &region))
        return false;
    if (overlaps(dev->regions, dev->nregions, &region)) {
        unmap_region(&region);
        connection_close(connection, 1, "memory regions overlap");
        return false;
    }
    dev->regions[dev->nregions++] = region;
    return remap_rings(connection);
}

bool memory_remove(struct connection *connection, const VhostUserMsg *message)
{
    VuDev *dev = &connection->dev;
    VhostUserMemoryRegion given = message->payload.memreg.region;
    for (uint32_t i = 0; i < dev->nregions; i++) {
        VuDevRegion *region = &dev->regions[i];
        if (region->gpa != given.guest_phys_addr || region->qva != given.userspace_addr || region->size != given.memory_size)
            continue;
        unmap_region(region);
        memmove(region, region + 1, (dev->nregions - i - 1) * sizeof *region);
        dev->nregions--;
        return remap_rings(connection);
    }
    connection_close(connection, 1, "a memory region to remove that is not there");
    return false;
}

void *memory_translate(const struct connection *connection, uint64_t guest_address, uint64_t *bytes)
{
    const VuDev *dev = &connection->dev;
    for (uint32_t i = 0; i < dev->nregions; i++) {
        const VuDevRegion *region = &dev->regions[i];
        uint64_t offset = guest_address - region->gpa;
        if (offset >= region->size) /* also below it: the difference wraps */
            continue;
        if (*bytes > region->size - offset)
            *bytes = region->size - offset;
        return (void *)(uintptr_t)(region->mmap_addr + region->mmap_offset + offset);
    }
    return NULL;
}

void *memory_at(const struct connection *connection, uint64_t front_end_address, uint64_t bytes)
{
    const VuDev *dev = &connection->dev;
    for (uint32_t i = 0; i < dev->nregions; i++) {
        const VuDevRegion *region = &dev->regions[i];
        uint64_t offset = front_end_address - region->qva;
        if (offset < region->size && bytes <= region->size - offset)
            return (void *)(uintptr_t)(region->mmap_addr + region->mmap_offset + offset);
    }
    return NULL;
}

static void drop_log(struct connection *connection)
{
    if (connection->log) {
        sigbus_forget(connection->log);
        munmap(connection->log, connection->log_bytes);
        connection->log = NULL;
    }
}

bool memory_set_log(struct connection *connection, const VhostUserMsg *message)
{
    uint64_t bytes = message->payload.log.mmap_size, offset = message->payload.log.mmap_offset, end;
    if (!bytes || __builtin_add_overflow(bytes, offset, &end) || end > INT64_MAX || offset % VHC_BLOCK ||
        !file_holds(message->fds[0], end)) {
        connection_close(connection, 1, "a dirty log of impossible size");
        return false;
    }
    void *log = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, message->fds[0], (off_t)offset);
    if (log == MAP_FAILED || !sigbus_watch(log, bytes, &connection->bus_error)) {
        if (log != MAP_FAILED)
            munmap(log, bytes);
        connection_close(connection, 1, "the dirty log cannot be mapped");
        return false;
    }
    drop_log(connection);
    connection->log = log;
    connection->log_bytes = bytes;
    return true;
}

void memory_log_guest(struct connection *connection, uint64_t guest_address, uint64_t bytes)
{
    uint64_t end;
    if (!bytes || connection->bus_error)
        return;
    if (__builtin_add_overflow(guest_address, bytes - 1, &end) || end / VHOST_LOG_PAGE / 8 >= connection->log_bytes) {
        connection_close(connection, 1, "the dirty log is smaller than the memory");
        return;
    }
    for (uint64_t page = guest_address / VHOST_LOG_PAGE; page <= end / VHOST_LOG_PAGE; page++)
        __atomic_fetch_or(&connection->log[page / 8], (uint8_t)(1u << page % 8), __ATOMIC_RELAXED);
    connection->log_written = true;
}

/* Descriptors lie in memory that the guest may have changed meanwhile, so the guest address is found from ours. */
void memory_log_host(struct connection *connection, const void *address, uint64_t bytes)
{
    const VuDev *dev = &connection->dev;
    for (uint32_t i = 0; i < dev->nregions; i++) {
        const VuDevRegion *region = &dev->regions[i];
        uint64_t offset = (uintptr_t)address - (region->mmap_addr + region->mmap_offset);
        if (offset < region->size) {
            assert(bytes <= region->size - offset);
            memory_log_guest(connection, region->gpa + offset, bytes);
            return;
        }
    }
    assert(!"an answer in memory that is not the front-end's");
}

void memory_drop(struct connection *connection)
{
    VuDev *dev = &connection->dev;
    for (uint32_t i = 0; i < dev->nregions; i++)
        unmap_region(&dev->regions[i]);
    dev->nregions = 0;
    drop_log(connection);
    if (dev->inflight_info.addr) {
        sigbus_forget(dev->inflight_info.addr);
        munmap(dev->inflight_info.addr, dev->inflight_info.size);
        dev->inflight_info.addr = NULL;
    }
}
