/* One front-end's connection: reading messages without ever waiting for them, holding back those that need quiet, and leaving.
 *
 * Quiesce: when a message stops a queue, or changes memory or features under a running one, nothing more is popped, the core is asked
 * to settle what it has (VHC_EV_QUIESCE), and the message waits. Guest memory stays mapped until every request has been completed or
 * dropped and no I/O uses it any more. The same holds when the front-end leaves, however it does. */
#include "backend.h"
#include "internal.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MESSAGES_PER_LOOK 64 /* of one front-end, then it is the others' turn */

static void connection_panic(VuDev *dev, const char *message)
{
    struct connection *connection = (struct connection *)((char *)dev - offsetof(struct connection, dev));
    connection_close(connection, 1, "%s", message ? message : "out of memory");
}

/* The library asks for the next message; it is here already. */
static bool hand_over(VuDev *dev, int socket, VhostUserMsg *message)
{
    struct connection *connection = (struct connection *)((char *)dev - offsetof(struct connection, dev));
    (void)socket;
    *message = connection->message;
    memset(&connection->message, 0, sizeof connection->message);
    connection->message_bytes = 0;
    connection->held = false;
    return true;
}

/* Only kick descriptors of queues with a handler are watched through this, and none has one: ours are watched by messages.c. */
static void set_watch(VuDev *dev, int fd, int condition, vu_watch_cb callback, void *data)
{
    (void)dev, (void)fd, (void)condition, (void)callback, (void)data;
}

static void remove_watch(VuDev *dev, int fd)
{
    struct connection *connection = (struct connection *)((char *)dev - offsetof(struct connection, dev));
    watch_remove(connection->volume->engine, fd);
}

void connection_open(struct volume *volume, int fd)
{
    struct connection *connection = &volume->connection;
    memset(connection, 0, sizeof *connection);
    connection->volume = volume;
    connection->reply_fd = -1;
    volume->handing_over = volume->may_stop = volume->given_up = false;
    volume->message[0] = 0;
    if (!vu_init(&connection->dev, volume->config.num_queues, fd, connection_panic, hand_over, set_watch, remove_watch,
                 &connection_interface)) {
        close(fd);
        return;
    }
    if (!watch_add(volume->engine, fd, EPOLLIN | EPOLLRDHUP, WATCH(WATCH_SOCKET, 0, volume->number))) {
        vu_deinit(&connection->dev);
        return;
    }
    for (uint32_t i = 0; i < volume->config.num_queues; i++) {
        connection->queues[i].vq = vu_get_queue(&connection->dev, (int)i);
        connection->queues[i].index = (uint16_t)i;
    }
    connection->state = CONNECTION_ACTIVE;
    connection->wants_input = true;
    connection->generation = ++volume->connections;
    volume_listen(volume, false);
    engine_event(volume->engine, VHC_EV_CONNECTED, volume->number, connection->generation);
}

/* While a message is held back only the front-end's end is of interest. */
static void watch_socket(struct connection *connection, bool input)
{
    if (connection->wants_input == input)
        return;
    connection->wants_input = input;
    struct epoll_event event = {.events = (input ? EPOLLIN : 0u) | EPOLLRDHUP,
                                .data.u64 = WATCH(WATCH_SOCKET, 0, connection->volume->number)};
    epoll_ctl(connection->volume->engine->epoll_fd, EPOLL_CTL_MOD, connection->dev.sock, &event);
}

/* The events of a turn come before its requests, so the news waits for a turn that has not reported any. */
static void tell_core(struct connection *connection)
{
    struct volume *volume = connection->volume;
    if (!connection->quiesce_due || volume->engine->requests)
        return;
    connection->quiesce_due = false;
    if (connection->outstanding)
        engine_event(volume->engine, VHC_EV_QUIESCE, volume->number, connection->may_drop);
}

void connection_quiesce(struct connection *connection, bool may_drop)
{
    connection->quiesce_due |= !connection->quiescing || (may_drop && !connection->may_drop);
    connection->quiescing = true;
    connection->may_drop |= may_drop;
    tell_core(connection);
}

void connection_close(struct connection *connection, int reason, const char *format, ...)
{
    struct volume *volume = connection->volume;
    if (connection->state != CONNECTION_ACTIVE) {
        if (!connection->graceful)
            return;
        connection->graceful = false; /* it has gone before the answers could be given */
        connection->reason = reason;
        connection_quiesce(connection, true);
        return;
    }
    if (reason) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(volume->message, sizeof volume->message, format, arguments);
        va_end(arguments);
    }
    volume_notify(volume); /* what has been answered is answered */
    connection->state = CONNECTION_CLOSING;
    connection->reason = reason;
    connection_quiesce(connection, true);
    watch_remove(volume->engine, connection->dev.sock);
    for (uint32_t i = 0; i < connection->dev.max_queues; i++) {
        if (connection->dev.vq[i].kick_fd >= 0)
            watch_remove(volume->engine, connection->dev.vq[i].kick_fd);
        queue_set_polled(connection, &connection->queues[i], false);
    }
}

static void drop_message(struct connection *connection)
{
    for (int i = 0; i < connection->message.fd_num; i++)
        close(connection->message.fds[i]);
    connection->message.fd_num = 0;
    connection->message_bytes = 0;
    connection->held = false;
}

static void finish(struct connection *connection)
{
    struct volume *volume = connection->volume;
    while (connection->postponed) {
        struct request *request = connection->postponed;
        connection->postponed = request->next;
        request_free(request);
    }
    if (connection->graceful)
        volume_notify(volume);
    watch_remove(volume->engine, connection->dev.sock);
    for (uint32_t i = 0; i < connection->dev.max_queues; i++)
        queue_set_polled(connection, &connection->queues[i], false);
    drop_message(connection);
    memory_drop(connection);
    vu_deinit(&connection->dev);
    connection->state = CONNECTION_NONE;
    engine_event(volume->engine, VHC_EV_DISCONNECTED, volume->number, (uint64_t)connection->reason);
    if (!volume->stopping)
        volume_listen(volume, true);
}

/* Read what there is of the next message. True: it is whole. */
static bool read_message(struct connection *connection)
{
    VhostUserMsg *message = &connection->message;
    for (;;) {
        uint32_t wanted = VHOST_USER_HDR_SIZE;
        if (connection->message_bytes >= wanted) {
            if (message->size > sizeof message->payload) {
                connection_close(connection, 1, "a message of %u bytes", message->size);
                return false;
            }
            wanted += message->size;
        }
        if (connection->message_bytes == wanted && connection->message_bytes >= VHOST_USER_HDR_SIZE)
            return true;
        struct iovec part = {(uint8_t *)message + connection->message_bytes, wanted - connection->message_bytes};
        char control[CMSG_SPACE(VHOST_MEMORY_BASELINE_NREGIONS * sizeof(int))] __attribute__((aligned(8)));
        struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        ssize_t got = recvmsg(connection->dev.sock, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return false;
        if (got < 0) {
            connection_close(connection, errno != ECONNRESET, "the socket cannot be read: %s", strerror(errno));
            return false;
        }
        bool room = true, named = false;
        for (struct cmsghdr *extra = CMSG_FIRSTHDR(&header); extra; extra = CMSG_NXTHDR(&header, extra)) {
            if (extra->cmsg_level != SOL_SOCKET || extra->cmsg_type != SCM_RIGHTS)
                continue;
            for (size_t i = 0; i < (extra->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
                int fd;
                memcpy(&fd, CMSG_DATA(extra) + i * sizeof fd, sizeof fd);
                named = named || fd_is_named_socket(fd);
                if (message->fd_num < VHOST_MEMORY_BASELINE_NREGIONS) {
                    message->fds[message->fd_num++] = fd;
                } else {
                    close(fd);
                    room = false;
                }
            }
        }
        if (!got) {
            connection_close(connection, connection->message_bytes != 0, "the front-end left in the middle of a message");
            return false;
        }
        if (!room || header.msg_flags & MSG_CTRUNC) {
            connection_close(connection, 1, "more file descriptors than a message may have");
            return false;
        }
        if (named) { /* of a message that never becomes whole, too */
            connection_close(connection, 1, "a message may not bring the socket of a connection");
            return false;
        }
        connection->message_bytes += (uint32_t)got;
    }
}

/* Answers are small, and the socket takes one when it says that it is writable. A front-end that does not read them is not waited for. */
static bool answers_are_read(struct connection *connection)
{
    struct pollfd socket = {.fd = connection->dev.sock, .events = POLLOUT};
    return poll(&socket, 1, 0) == 1 && socket.revents & POLLOUT;
}

static void dispatch(struct connection *connection)
{
    if (!answers_are_read(connection)) {
        connection_close(connection, 1, "the front-end does not read its answers");
        return;
    }
    watch_socket(connection, true);
    connection->quiescing = connection->may_drop = connection->quiesce_due = false;
    connection->volume->handing_over = connection->volume->may_stop = false;
    bool sent = vu_dispatch(&connection->dev);
    if (connection->reply_fd >= 0) {
        close(connection->reply_fd);
        connection->reply_fd = -1;
    }
    if (!sent && connection->state == CONNECTION_ACTIVE)
        connection_close(connection, 0, "the socket cannot be written");
}

/* Requests made before the guest switched its write cache have to reach the core before the news of it. */
static bool wants_look(struct connection *connection)
{
    vhc_engine *engine = connection->volume->engine;
    if (connection->held) {
        bool waits = engine->looks == connection->held_at_look;
        engine->again |= waits; /* this look has only begun: there has to be another one, with nothing to wake it */
        return waits;
    }
    for (uint32_t i = 0; i < connection->dev.max_queues; i++)
        if (connection->queues[i].running && !connection->queues[i].disabled)
            queue_set_polled(connection, &connection->queues[i], true);
    engine->again = true;
    return connection->running_queues;
}

/* Nothing is popped any more, and the core is told once that all has been answered. */
static bool waits_for_hand_over(struct connection *connection)
{
    struct volume *volume = connection->volume;
    if (connection->postponed && !connection->quiescing)
        return true; /* the core has to see them again first */
    connection_quiesce(connection, false);
    if (!connection_settled(connection))
        return true;
    if (!volume->attached || volume->may_stop)
        return false;
    if (!volume->handing_over)
        engine_event(volume->engine, VHC_EV_HAND_OVER, volume->number, 0);
    volume->handing_over = true;
    return true;
}

/* The message is whole: process it now, or hold it back. True: processed. */
static bool consider(struct connection *connection)
{
    enum verdict verdict = message_judge(connection, &connection->message);
    bool waits = false;
    switch (verdict) {
    case VERDICT_BROKEN:
        return false;
    case VERDICT_PROCESS:
        break;
    case VERDICT_LOOK:
        waits = wants_look(connection);
        break;
    case VERDICT_SETTLE:
    case VERDICT_SETTLE_OR_DROP:
        waits = !connection_settled(connection);
        /* Dropped requests whose queue goes on have to be seen by the core again before their memory may change. */
        if (verdict == VERDICT_SETTLE && connection->postponed && !connection->quiescing)
            waits = true;
        else if (waits)
            connection_quiesce(connection, verdict == VERDICT_SETTLE_OR_DROP);
        break;
    case VERDICT_HAND_OVER:
        waits = waits_for_hand_over(connection);
    }
    if (waits) {
        if (!connection->held)
            connection->held_at_look = connection->volume->engine->looks;
        connection->held = true;
        watch_socket(connection, false);
        return false;
    }
    dispatch(connection);
    return true;
}

void connection_abandon(struct connection *connection)
{
    finish(connection);
}

/* vhc_volume_stop: answer what has been begun, then leave. */
void connection_retire(struct connection *connection)
{
    if (connection->state != CONNECTION_ACTIVE)
        return;
    drop_message(connection);
    watch_socket(connection, false);
    connection->state = CONNECTION_CLOSING;
    connection->graceful = true;
    connection->quiescing = connection->may_drop = connection->quiesce_due = false;
    connection_quiesce(connection, false);
}

void connection_input(struct connection *connection, uint32_t events)
{
    if (connection->state == CONNECTION_NONE)
        return;
    if (connection->held || connection->state == CONNECTION_CLOSING) {
        if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
            watch_remove(connection->volume->engine, connection->dev.sock);
            connection_close(connection, 0, "the front-end left");
        }
        return;
    }
    for (int i = 0; i < MESSAGES_PER_LOOK && connection->state == CONNECTION_ACTIVE && !connection->held; i++)
        if (!read_message(connection) || !consider(connection))
            return;
}

void connection_progress(struct connection *connection)
{
    tell_core(connection);
    if (connection->quiescing && connection->may_drop && connection->guest_io && connection->volume->backend->facts.can_abandon)
        requests_abandon(connection);
    if (connection->bus_error && (connection->state == CONNECTION_ACTIVE || connection->graceful))
        connection_close(connection, 1, "the front-end has truncated its memory");
    if (connection->state == CONNECTION_ACTIVE && connection->held && consider(connection))
        connection_input(connection, 0);
    if (connection->state == CONNECTION_CLOSING && connection_settled(connection))
        finish(connection);
}
