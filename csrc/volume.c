/* Volumes: what one guest sees as a disk. Listening, accepting one front-end at a time, the configuration space, figures. */
#include <endian.h>
#include <errno.h>
#include <linux/virtio_blk.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "backend.h"
#include "io.h"

#define ACCEPT_RETRY_NS 100000000ull /* after running out of descriptors or memory */

/* The product of both is a request that is accepted. */
static void segment_limits(const struct volume *volume, uint32_t *size_max, uint32_t *seg_max)
{
    uint32_t most = volume->limits.payload_max, size = most / VBLK_SEG_MAX / VHC_BLOCK * VHC_BLOCK;
    *size_max = size > VBLK_SIZE_MAX ? VBLK_SIZE_MAX : size ? size : VHC_BLOCK;
    *seg_max = most / *size_max < VBLK_SEG_MAX ? most / *size_max : VBLK_SEG_MAX;
}

static void fill_config_space(struct volume *volume)
{
    const vhc_volume_config *config = &volume->config;
    uint32_t size_max, seg_max;
    segment_limits(volume, &size_max, &seg_max);
    struct virtio_blk_config space = {
        .capacity = volume->size_bytes / VBLK_SECTOR,
        .size_max = size_max,
        .seg_max = seg_max,
        .blk_size = VBLK_SECTOR,
        .physical_block_exp = 3, /* 4 KiB */
        .min_io_size = VHC_BLOCK / VBLK_SECTOR,
        .opt_io_size = config->object_bytes / VBLK_SECTOR,
        .wce = config->write_cache,
        .num_queues = config->num_queues,
    };
    if (!config->read_only) {
        space.max_discard_sectors = space.max_write_zeroes_sectors = volume->limits.discard_max;
        space.max_discard_seg = space.max_write_zeroes_seg = 1;
        space.discard_sector_alignment = VHC_BLOCK / VBLK_SECTOR;
        space.write_zeroes_may_unmap = 1;
    }
    memcpy(volume->config_space, &space, sizeof volume->config_space);
}

static const char *storage_problem(const vhc_volume_config *config)
{
    if (config->slots <= VHC_FIRST_SLOT)
        return "no slots";
    if (!config->write_depth)
        return "a limit is zero";
    if (__builtin_popcount(config->align_mem_bytes) != 1 || __builtin_popcount(config->align_io_bytes) != 1 ||
        config->align_io_bytes > (1u << 20) || config->align_mem_bytes > (1u << 20))
        return "an alignment is not a power of two";
    if (config->cache_fd >= 0 && (!config->ring_bytes || config->ring_bytes % VHC_BLOCK))
        return "the log's ring is not a multiple of 4096";
    if (config->tier_fd >= 0 && (!config->tier_entries || config->tier_entries_offset < VHC_BLOCK || config->tier_entries_offset % 8 ||
                                 config->tier_slab_offset % VHC_BLOCK || config->tier_slab_offset < config->tier_entries_offset +
                                 (uint64_t)config->tier_entries * sizeof(struct tier_entry)))
        return "the parts of the RAM-tier file overlap or lie nowhere";
    return NULL;
}

static bool sound(const vhc_volume_config *config, char *error, size_t error_bytes)
{
    const char *what = NULL;
    if (!config->size_bytes || config->size_bytes % VBLK_SECTOR || config->size_bytes > INT64_MAX)
        what = "the size is not a multiple of 512";
    else if (!config->num_queues || config->num_queues > VHC_MAX_QUEUES)
        what = "the number of queues is not in 1..64";
    else if (!config->object_bytes || config->object_bytes % VHC_BLOCK)
        what = "the object size is not a multiple of 4096";
    else if (config->discard_max_bytes < VHC_BLOCK)
        what = "a limit is zero";
    else if (config->request_max_bytes && config->request_max_bytes < VHC_BLOCK)
        what = "the largest request is smaller than a block";
    else if (!config->detached)
        what = storage_problem(config);
    if (what)
        snprintf(error, error_bytes, "%s", what);
    return !what;
}

static uint32_t larger(const uint32_t *of_targets)
{
    return of_targets[IO_BACKEND] > of_targets[IO_CACHE] ? of_targets[IO_BACKEND] : of_targets[IO_CACHE];
}

/* What the configuration space and the checks of requests follow from. */
static void set_limits(struct volume *volume)
{
    const vhc_volume_config *config = &volume->config;
    volume->limits = (struct vblk_limits){.capacity = volume->size_bytes / VBLK_SECTOR,
                                          .discard_max = config->discard_max_bytes / VBLK_SECTOR,
                                          .payload_max = VBLK_MAX_PAYLOAD,
                                          .align_mem = larger(volume->align_mem),
                                          .align_io = larger(volume->align_io),
                                          .read_only = config->read_only};
    if (config->request_max_bytes && config->request_max_bytes < VBLK_MAX_PAYLOAD)
        volume->limits.payload_max = config->request_max_bytes;
    fill_config_space(volume);
}

static void destroy_storage(struct volume *volume)
{
    backend_release(volume);
    slab_destroy(volume);
    tier_destroy(volume);
    log_destroy(volume);
    volume->cache_file.fd = -1;
    volume->attached = false;
}

static bool create_storage(struct volume *volume, char *error, size_t error_bytes)
{
    const vhc_volume_config *config = &volume->config;
    volume->cache_file.fd = config->cache_fd;
    volume->align_mem[IO_CACHE] = config->align_mem_bytes;
    volume->align_io[IO_CACHE] = config->align_io_bytes;
    if (!backend_adopt(volume, config->backend, error, error_bytes))
        return false;
    if (!tier_create(volume, error, error_bytes) || !slab_create(volume, error, error_bytes) || !log_create(volume, error, error_bytes)) {
        destroy_storage(volume);
        return false;
    }
    volume->engine->driver->add_volume(volume->engine, volume);
    volume->engine->driver->add_file(volume->engine, &volume->cache_file);
    volume->attached = true;
    return true;
}

static void volume_free(struct volume *volume)
{
    destroy_storage(volume);
    free(volume->groups);
    free(volume);
}

int vhc_volume_add(vhc_engine *engine, const vhc_volume_config *config, char *error, size_t error_bytes)
{
    if (!sound(config, error, error_bytes))
        return -1;
    if (engine->volumes_count == VHC_MAX_VOLUMES) {
        snprintf(error, error_bytes, "more than %d volumes", VHC_MAX_VOLUMES);
        return -1;
    }
    struct volume *volume = calloc(1, sizeof *volume);
    if (!volume || !(volume->groups = calloc(VHC_GROUPS, sizeof *volume->groups))) {
        snprintf(error, error_bytes, "out of memory");
        free(volume);
        return -1;
    }
    volume->engine = engine;
    volume->number = engine->volumes_count;
    volume->config = *config;
    volume->config.serial[sizeof volume->config.serial - 1] = 0;
    volume->listen_fd = config->listen_fd;
    volume->slab_fd = volume->buffer_base = volume->kept_buffer_base = -1;
    volume->cache_file = (struct io_file){-1, -1};
    volume->waiting_last = &volume->waiting_first;
    volume->connection.volume = volume;
    volume->size_bytes = config->size_bytes;
    volume->align_mem[IO_BACKEND] = volume->align_mem[IO_CACHE] = volume->align_io[IO_BACKEND] = volume->align_io[IO_CACHE] = 1;
    if (!config->detached && !create_storage(volume, error, error_bytes)) {
        volume_free(volume);
        return -1;
    }
    set_limits(volume);
    engine->volumes[engine->volumes_count++] = volume;
    return (int)volume->number;
}

int vhc_volume_attach(vhc_engine *engine, uint32_t number, const vhc_volume_config *config, char *error, size_t error_bytes)
{
    assert(number < engine->volumes_count);
    struct volume *volume = engine->volumes[number];
    assert(!volume->attached && !config->detached);
    if (!sound(config, error, error_bytes))
        return -1;
    vhc_volume_config before = volume->config;
    volume->config = *config;
    volume->config.listen_fd = before.listen_fd;
    volume->config.num_queues = before.num_queues;
    memcpy(volume->config.serial, before.serial, sizeof before.serial);
    volume->size_bytes = config->size_bytes;
    if (!create_storage(volume, error, error_bytes)) {
        volume->config = before;
        volume->size_bytes = before.size_bytes;
        return -1;
    }
    volume->config.write_cache = volume->config_space[offsetof(struct virtio_blk_config, wce)]; /* as the guest has set it meanwhile */
    set_limits(volume);
    return 0;
}

void vhc_volume_detach(vhc_engine *engine, uint32_t number)
{
    assert(number < engine->volumes_count);
    struct volume *volume = engine->volumes[number];
    const struct connection *connection = &volume->connection;
    assert(volume->attached && !volume->writes_in_flight && !volume->waiting_first);
    assert(connection->state == CONNECTION_NONE || (connection_settled(connection) && !connection->postponed));
    for (uint32_t i = 0; i < VHC_GROUPS; i++)
        assert(!volume->groups[i].pending);
    engine->driver->remove_volume(engine, volume);
    engine->driver->remove_file(engine, &volume->cache_file);
    destroy_storage(volume);
    volume->config.detached = 1;
}

void vhc_volume_hold(vhc_engine *engine, uint32_t number, int hold)
{
    assert(number < engine->volumes_count);
    engine->volumes[number]->on_hold = hold != 0;
}

void vhc_volume_stopped(vhc_engine *engine, uint32_t number)
{
    assert(number < engine->volumes_count);
    engine->volumes[number]->may_stop = engine->volumes[number]->handing_over;
}

int vhc_volume_give_up(vhc_engine *engine, uint32_t number)
{
    assert(number < engine->volumes_count);
    struct volume *volume = engine->volumes[number];
    struct connection *connection = &volume->connection;
    if (connection->state != CONNECTION_ACTIVE || !connection->held || connection->message.request != VHOST_USER_GET_VRING_BASE ||
        connection_settled(connection))
        return 0;
    volume->given_up = true;
    return 1;
}

void vhc_volume_disconnect(vhc_engine *engine, uint32_t number)
{
    assert(number < engine->volumes_count);
    struct volume *volume = engine->volumes[number];
    if (volume->connection.state != CONNECTION_NONE)
        connection_close(&volume->connection, 0, "the daemon wants it");
}

/* While a front-end is connected the next one waits in the socket's backlog. */
void volume_listen(struct volume *volume, bool on)
{
    if (on == volume->listening || volume->listen_fd < 0)
        return;
    if (on)
        on = watch_add(volume->engine, volume->listen_fd, EPOLLIN, WATCH(WATCH_LISTEN, 0, volume->number));
    else
        watch_remove(volume->engine, volume->listen_fd);
    volume->listening = on;
}

void volume_accept(struct volume *volume)
{
    if (volume->connection.state != CONNECTION_NONE || volume->stopping)
        return;
    int fd = accept4(volume->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) {
        connection_open(volume, fd);
    } else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
        volume_listen(volume, false); /* it would be reported again and again */
        volume->engine->accept_retry_ns = volume->engine->now_ns + ACCEPT_RETRY_NS;
    }
}

void vhc_volume_start(vhc_engine *engine, uint32_t number)
{
    assert(number < engine->volumes_count);
    engine->volumes[number]->started = true;
    volume_listen(engine->volumes[number], true);
}

void vhc_volume_stop(vhc_engine *engine, uint32_t number)
{
    assert(number < engine->volumes_count);
    struct volume *volume = engine->volumes[number];
    volume_listen(volume, false);
    volume->stopping = true;
    if (volume->listen_fd >= 0)
        close(volume->listen_fd);
    volume->listen_fd = -1;
    backends_stop(volume);
    connection_retire(&volume->connection);
}

int vhc_volume_grow(vhc_engine *engine, uint32_t number, uint64_t size_bytes)
{
    assert(number < engine->volumes_count);
    struct volume *volume = engine->volumes[number];
    assert(size_bytes >= volume->size_bytes && size_bytes % VBLK_SECTOR == 0);
    volume->config.size_bytes = volume->size_bytes = size_bytes;
    backend_grown(volume);
    volume->limits.capacity = size_bytes / VBLK_SECTOR;
    uint64_t capacity = htole64(volume->limits.capacity);
    memcpy(volume->config_space + offsetof(struct virtio_blk_config, capacity), &capacity, sizeof capacity);
    return connection_config_changed(&volume->connection);
}

void vhc_set_write_cache(vhc_engine *engine, uint32_t number, int enabled)
{
    assert(number < engine->volumes_count);
    engine->volumes[number]->config_space[offsetof(struct virtio_blk_config, wce)] = enabled != 0;
}

void vhc_read_volume_stats(vhc_engine *engine, uint32_t number, vhc_volume_stats *stats)
{
    assert(number < engine->volumes_count);
    *stats = engine->volumes[number]->stats;
}

const char *vhc_volume_message(vhc_engine *engine, uint32_t number)
{
    assert(number < engine->volumes_count);
    return engine->volumes[number]->message;
}

void *vhc_slab(vhc_engine *engine, uint32_t number)
{
    assert(number < engine->volumes_count);
    return engine->volumes[number]->slab;
}

/* All I/O has ended. Front-ends are cut off. */
void volume_destroy(struct volume *volume)
{
    struct connection *connection = &volume->connection;
    volume->stopping = true;
    if (connection->state != CONNECTION_NONE) {
        connection_close(connection, 0, "the daemon ends");
        connection_abandon(connection);
    }
    volume_listen(volume, false);
    if (volume->listen_fd >= 0)
        close(volume->listen_fd);
    volume_free(volume);
}
