/* The engine itself: one turn, its results, and the descriptors it watches. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "backend.h"
#include "io.h"

uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Twice as many items. Sizes are bounded by rings, groups and queues; without memory for them nothing can go on. */
void *engine_grow(void *items, uint32_t *size, size_t item_bytes)
{
    uint32_t larger = *size ? *size * 2 : 64;
    items = realloc(items, larger * item_bytes);
    assert(items);
    *size = larger;
    return items;
}

#define APPEND(vector, value)                                                                                       \
    do {                                                                                                            \
        if ((vector).count == (vector).size)                                                                        \
            (vector).items = engine_grow((vector).items, &(vector).size, sizeof *(vector).items);                   \
        (vector).items[(vector).count++] = (value);                                                                 \
    } while (0)

void engine_event(vhc_engine *engine, uint32_t kind, uint32_t volume, uint64_t arg)
{
    APPEND(engine->event_kind, kind);
    APPEND(engine->event_volume, volume);
    APPEND(engine->event_arg, arg);
}

void engine_done(vhc_engine *engine, uint32_t volume, uint32_t group, int32_t result)
{
    APPEND(engine->done_volume, volume);
    APPEND(engine->done_group, group);
    APPEND(engine->done_result, result);
}

bool watch_add(vhc_engine *engine, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};
    return epoll_ctl(engine->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

bool watch_change(vhc_engine *engine, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};
    return epoll_ctl(engine->epoll_fd, EPOLL_CTL_MOD, fd, &event) == 0;
}

void watch_remove(vhc_engine *engine, int fd)
{
    struct epoll_event none = {0};
    epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, fd, &none); /* one that is not watched is no error */
}

vhc_engine *vhc_engine_new(const vhc_engine_config *config, char *error, size_t error_bytes)
{
    vhc_engine *engine = calloc(1, sizeof *engine);
    snprintf(error, error_bytes, "out of memory");
    if (!engine)
        return NULL;
    engine->config = *config;
    engine->ended_last = &engine->ended_first;
    engine->backends_due_ns = BACKEND_NEVER;
    engine->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    engine->volumes = calloc(VHC_MAX_VOLUMES, sizeof *engine->volumes);
    engine->now_ns = clock_ns();
    struct sigaction pipe_action;
    if (sigaction(SIGPIPE, NULL, &pipe_action) == 0 && pipe_action.sa_handler == SIG_DFL)
        signal(SIGPIPE, SIG_IGN); /* front-ends close sockets and pipes when they like */
    if (engine->epoll_fd < 0 || !engine->volumes || !sigbus_install() || !io_create(engine, error, error_bytes)) {
        if (engine->epoll_fd < 0)
            snprintf(error, error_bytes, "cannot watch descriptors: %s", strerror(errno));
        vhc_engine_free(engine);
        return NULL;
    }
    error[0] = 0;
    return engine;
}

void vhc_engine_free(vhc_engine *engine)
{
    if (!engine)
        return;
    io_destroy(engine);
    for (uint32_t i = 0; i < engine->tags; i++)
        if (engine->by_tag[i])
            request_free(engine->by_tag[i]);
    for (uint32_t i = 0; i < engine->volumes_count; i++)
        volume_destroy(engine->volumes[i]);
    backends_destroy(engine);
    io_forget(engine);
    for (uint32_t i = 0; i < engine->request_chunks.count; i++)
        free(engine->request_chunks.items[i]);
    if (engine->epoll_fd >= 0)
        close(engine->epoll_fd);
    free(engine->request_chunks.items);
    free(engine->by_tag);
    free(engine->free_tags);
    free(engine->volumes);
    free(engine->group_volume.items);
    free(engine->group_end.items);
    free(engine->done_volume.items);
    free(engine->done_group.items);
    free(engine->done_result.items);
    free(engine->event_kind.items);
    free(engine->event_volume.items);
    free(engine->event_arg.items);
    free(engine);
}

int vhc_watch(vhc_engine *engine, int fd, uint32_t number)
{
    return watch_add(engine, fd, EPOLLIN, WATCH(WATCH_OTHER, 0, number)) ? 0 : -1;
}

int vhc_turn(vhc_engine *engine, const uint64_t *operations, uint32_t words, int64_t timeout_ns, vhc_turn_result *result)
{
    engine->requests = 0;
    engine->group_volume.count = engine->group_end.count = 0;
    engine->done_volume.count = engine->done_group.count = engine->done_result.count = 0;
    engine->stats.turns++;
    engine->now_ns = clock_ns();
    operations_run(engine, operations, words);
    if (engine->push_first)
        backends_push(engine);
    engine->driver->flush(engine);
    poll_turn(engine, timeout_ns);

    *result = (vhc_turn_result){
        .requests = engine->requests,
        .groups = engine->group_volume.count,
        .group_volume = engine->group_volume.items,
        .group_end = engine->group_end.items,
        .what = engine->what,
        .tag = engine->tag,
        .sectors = engine->sectors,
        .sector = engine->sector,
        .completions = engine->done_group.count,
        .done_volume = engine->done_volume.items,
        .done_group = engine->done_group.items,
        .done_result = engine->done_result.items,
        .events = engine->event_kind.count,
        .event_kind = engine->event_kind.items,
        .event_volume = engine->event_volume.items,
        .event_arg = engine->event_arg.items,
        .now_ns = engine->now_ns,
    };
    /* The caller has them now. Events are forgotten here and not at the start, so that those of calls between turns are reported. */
    engine->event_kind.count = engine->event_volume.count = engine->event_arg.count = 0;
    return 0;
}

void vhc_read_engine_stats(vhc_engine *engine, vhc_engine_stats *stats)
{
    *stats = engine->stats;
}
