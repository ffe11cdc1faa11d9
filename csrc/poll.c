/* Waiting: for requests in the rings, for I/O, for messages. Polls for a while, then sleeps.
 *
 * How long it polls adapts as in KVM's halt polling: the window grows (10 us, doubled, up to poll_max_us) while sleeps turn out
 * shorter than poll_max_us, so that polling would have been worth it, and falls to zero after a long sleep. There is one window for
 * waiting for the guest and one for waiting for I/O. While a queue is polled its kicks are switched off; before a sleep they are
 * switched on and the ring is looked at once more. An idle daemon sleeps in epoll without a time-out. */
#include <errno.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "backend.h"
#include "io.h"

#define EVENTS 64
#define EPOLL_EVERY_NS 5000ull        /* while polling */
#define EPOLL_EVERY_BUSY_NS 50000ull  /* while every turn has something to report */
#define FIRST_WINDOW_NS 10000ull
#define STALLED_NS 1000000

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("" ::: "memory");
#endif
}

static bool reported(const vhc_engine *engine)
{
    return engine->requests || engine->done_group.count || engine->event_kind.count;
}

/* The eventfd is not read: it is edge-triggered, so each kick is reported once, and a read would block for ever when the front-end has
 * made the descriptor blocking again and emptied it first. */
static void kicked(struct volume *volume, uint32_t index)
{
    struct connection *connection = &volume->connection;
    if (connection->state == CONNECTION_NONE || index >= connection->dev.max_queues)
        return;
    struct queue *queue = &connection->queues[index];
    if (queue->vq->kick_fd < 0)
        return;
    volume->stats.kicks++;
    if (queue->running && !queue->disabled)
        queue_set_polled(connection, queue, true);
}

static void deliver(vhc_engine *engine, const struct epoll_event *event)
{
    uint32_t kind = (uint32_t)(event->data.u64 >> 56), index = (uint32_t)(event->data.u64 >> 32) & 0xffffff;
    uint32_t number = (uint32_t)event->data.u64;
    switch (kind) {
    case WATCH_LISTEN:
        volume_accept(engine->volumes[number]);
        break;
    case WATCH_SOCKET:
        connection_input(&engine->volumes[number]->connection, event->events);
        break;
    case WATCH_KICK:
        kicked(engine->volumes[number], index);
        break;
    case WATCH_BACKEND:
        backends_ready(engine, number, index, event->events);
        break;
    case WATCH_OTHER:
        engine_event(engine, VHC_EV_READABLE, number, 0);
        break;
    default: /* the driver: its ring is looked at anyway, and its eventfd is edge-triggered */
        break;
    }
}

/* False: a signal has come. timeout_ns: 0 only looks, -1 waits for ever. */
static bool look_at_descriptors(vhc_engine *engine, int64_t timeout_ns)
{
    struct epoll_event events[EVENTS];
    struct timespec timeout = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    int count = epoll_pwait2(engine->epoll_fd, events, EVENTS, timeout_ns < 0 ? NULL : &timeout, NULL);
    if (count < 0 && errno == ENOSYS) /* Linux before 5.11: a sleep is rounded up, so that the deadline has passed after it */
        count = epoll_wait(engine->epoll_fd, events, EVENTS, timeout_ns < 0 ? -1 : (int)((timeout_ns + 999999) / 1000000));
    if (count < 0)
        assert(errno == EINTR);
    engine->now_ns = engine->epoll_ns = clock_ns();
    for (int i = 0; i < count; i++)
        deliver(engine, &events[i]);
    return count >= 0;
}

static void retry_accepting(vhc_engine *engine)
{
    if (!engine->accept_retry_ns || engine->now_ns < engine->accept_retry_ns)
        return;
    engine->accept_retry_ns = 0;
    for (uint32_t i = 0; i < engine->volumes_count; i++) {
        struct volume *volume = engine->volumes[i];
        if (volume->started && !volume->stopping && volume->connection.state == CONNECTION_NONE)
            volume_listen(volume, true);
    }
}

/* Requests that the core has dropped for the sake of a queue that stopped, but whose own queue goes on. */
static uint32_t report_postponed(struct connection *connection, uint32_t limit)
{
    struct request *oldest_first = NULL;
    uint32_t count = 0;
    while (connection->postponed) {
        struct request *request = connection->postponed;
        connection->postponed = request->next;
        request->next = oldest_first;
        oldest_first = request;
    }
    while (oldest_first && count < limit) {
        struct request *request = oldest_first;
        oldest_first = request->next;
        request_report(request);
        count++;
    }
    connection->postponed = oldest_first;
    return count;
}

static void pop_volume(struct volume *volume, uint32_t limit)
{
    struct connection *connection = &volume->connection;
    vhc_engine *engine = volume->engine;
    uint32_t before = engine->requests, queues = connection->dev.max_queues;
    uint32_t popped = report_postponed(connection, limit);
    for (uint32_t i = 0; i < queues && popped < limit && connection_pops(connection); i++) {
        struct queue *queue = &connection->queues[(volume->next_queue + i) % queues];
        if (queue->polled && !queue->disabled)
            popped += queue_pop_all(connection, queue, limit - popped);
    }
    volume->next_queue = (volume->next_queue + 1) % queues;
    if (engine->requests == before)
        return;
    if (engine->group_volume.count == engine->group_volume.size)
        engine->group_volume.items = engine_grow(engine->group_volume.items, &engine->group_volume.size, sizeof(uint32_t));
    if (engine->group_end.count == engine->group_end.size)
        engine->group_end.items = engine_grow(engine->group_end.items, &engine->group_end.size, sizeof(uint32_t));
    engine->group_volume.items[engine->group_volume.count++] = volume->number;
    engine->group_end.items[engine->group_end.count++] = engine->requests;
}

static void pop_all(vhc_engine *engine)
{
    uint32_t count = engine->volumes_count;
    for (uint32_t i = 0; i < count && engine->requests < VHC_MAX_TURN_REQUESTS; i++) {
        struct volume *volume = engine->volumes[(engine->next_volume + i) % count];
        struct connection *connection = &volume->connection;
        if (!connection_pops(connection) || !(connection->polled_queues || connection->postponed))
            continue;
        uint32_t room = VHC_MAX_TURN_REQUESTS - engine->requests;
        pop_volume(volume, room < VHC_MAX_VOLUME_REQUESTS ? room : VHC_MAX_VOLUME_REQUESTS);
    }
    if (count)
        engine->next_volume = (engine->next_volume + 1) % count;
}

/* Tell front-ends what has been answered, and let their connections go on. */
static void progress(vhc_engine *engine)
{
    for (uint32_t i = 0; i < engine->volumes_count; i++) {
        struct connection *connection = &engine->volumes[i]->connection;
        if (connection->state == CONNECTION_NONE)
            continue;
        volume_notify(engine->volumes[i]);
        connection_progress(connection);
    }
}

/* Requests that were answered here, without the core: GET_ID, and bad ones. */
static void finish_popping(vhc_engine *engine)
{
    for (uint32_t i = 0; i < engine->volumes_count; i++) {
        struct volume *volume = engine->volumes[i];
        if (volume->connection.state == CONNECTION_ACTIVE)
            volume_notify(volume);
        if (volume->bad_requests) {
            engine_event(engine, VHC_EV_BAD_REQUEST, volume->number, volume->bad_requests);
            volume->bad_requests = 0;
        }
    }
}

/* Everything that can be done without waiting. What messages and completions have to report comes before new requests, as the core
 * expects it. */
static void look(vhc_engine *engine)
{
    engine->again = false;
    io_reap(engine);
    if (engine->ended_first || engine->now_ns >= engine->backends_due_ns)
        backends_look(engine);
    progress(engine);
    engine->looks++;
    pop_all(engine);
    finish_popping(engine);
    if (engine->push_first)
        backends_push(engine);
    engine->driver->flush(engine);
}

/* A ring turned out to be broken: its connection can be finished at the next look. */
static bool closing(const vhc_engine *engine)
{
    for (uint32_t i = 0; i < engine->volumes_count; i++) {
        const struct connection *connection = &engine->volumes[i]->connection;
        if (connection->state == CONNECTION_CLOSING && connection_settled(connection))
            return true;
        if (connection->bus_error && connection->state == CONNECTION_ACTIVE)
            return true;
    }
    return false;
}

/* Kicks on. False: a ring has something after all. */
static bool stop_polling(vhc_engine *engine)
{
    bool empty = true;
    for (uint32_t i = 0; i < engine->volumes_count && engine->polled_queues; i++) {
        struct connection *connection = &engine->volumes[i]->connection;
        for (uint32_t q = 0; connection->polled_queues && q < connection->dev.max_queues; q++) {
            struct queue *queue = &connection->queues[q];
            if (!queue->polled || (!connection_pops(connection) && !queue->disabled))
                continue; /* held back: it is looked at when the connection goes on */
            queue_set_polled(connection, queue, false);
            if (!queue->disabled && queue_has_work(queue)) {
                queue_set_polled(connection, queue, true);
                empty = false;
            }
        }
    }
    return empty;
}

static void adapt(vhc_engine *engine, uint64_t *window_ns, uint64_t waited_ns)
{
    uint64_t most = engine->config.poll_max_us * 1000ull;
    if (waited_ns > most)
        *window_ns = 0;
    else if (*window_ns < most) {
        *window_ns = *window_ns ? *window_ns * 2 : FIRST_WINDOW_NS;
        if (*window_ns > most)
            *window_ns = most;
    }
}

/* Sleep until something happens. False: a signal has come. */
static bool sleep_for(vhc_engine *engine, int64_t timeout_ns)
{
    bool undisturbed = true;
    engine->driver->wake(engine, true);
    if (engine->accept_retry_ns) {
        int64_t retry_ns = engine->accept_retry_ns > engine->now_ns ? (int64_t)(engine->accept_retry_ns - engine->now_ns) : 0;
        if (timeout_ns < 0 || retry_ns < timeout_ns)
            timeout_ns = retry_ns;
    }
    if (engine->backends_due_ns != BACKEND_NEVER) {
        int64_t due_ns = engine->backends_due_ns > engine->now_ns ? (int64_t)(engine->backends_due_ns - engine->now_ns) : 0;
        if (timeout_ns < 0 || due_ns < timeout_ns)
            timeout_ns = due_ns;
    }
    if (engine->io_stalled && (timeout_ns < 0 || timeout_ns > STALLED_NS))
        timeout_ns = STALLED_NS;
    if (!io_reap(engine)) {
        engine->stats.sleeps++;
        undisturbed = look_at_descriptors(engine, timeout_ns);
    }
    engine->driver->wake(engine, false);
    engine->driver->flush(engine);
    return undisturbed;
}

bool poll_backends(vhc_engine *engine, const bool *done)
{
    for (bool undisturbed = true; !*done && undisturbed;) {
        engine->now_ns = clock_ns();
        io_reap(engine);
        backends_look(engine);
        backends_push(engine);
        engine->driver->flush(engine);
        if (!*done && !engine->ended_first)
            undisturbed = sleep_for(engine, -1);
    }
    return *done;
}

void poll_turn(vhc_engine *engine, int64_t timeout_ns)
{
    uint64_t begun_ns = engine->now_ns;
    uint64_t deadline_ns = timeout_ns < 0 ? UINT64_MAX : begun_ns + (uint64_t)timeout_ns;
    uint64_t *window_ns = NULL;
    bool polled = false, undisturbed = true;
    if (engine->now_ns - engine->epoll_ns >= EPOLL_EVERY_BUSY_NS || timeout_ns == 0)
        undisturbed = look_at_descriptors(engine, 0);
    while (look(engine), undisturbed && !reported(engine)) {
        engine->now_ns = clock_ns();
        retry_accepting(engine);
        if (engine->now_ns >= deadline_ns)
            return;
        if (engine->again || closing(engine))
            continue;
        if (!window_ns)
            window_ns = &engine->window_ns[(engine->ios_in_flight | engine->remote_ios) != 0];
        if (engine->now_ns - begun_ns < *window_ns && !engine->syncs_in_flight &&
            (engine->polled_queues || engine->ios_in_flight || engine->remote_ios)) {
            engine->stats.polls += !polled;
            polled = true;
            if (engine->now_ns - engine->epoll_ns >= EPOLL_EVERY_NS)
                undisturbed = look_at_descriptors(engine, 0);
            else
                relax();
            continue;
        }
        if (!stop_polling(engine)) { /* a guest may keep its ring busy with what is answered here: others are heard all the same */
            if (engine->now_ns - engine->epoll_ns >= EPOLL_EVERY_BUSY_NS)
                undisturbed = look_at_descriptors(engine, 0);
            continue;
        }
        undisturbed = sleep_for(engine, timeout_ns < 0 ? -1 : (int64_t)(deadline_ns - engine->now_ns));
        adapt(engine, window_ns, engine->now_ns - begun_ns);
        begun_ns = engine->now_ns;
        polled = false;
    }
    engine->stats.poll_hits += polled;
}
