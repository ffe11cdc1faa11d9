/* The backend that is an NBD server's export: libnbd's asynchronous interface, driven by the engine's epoll.
 *
 * An I/O becomes commands: pieces no larger than the server takes, each for one contiguous piece of memory. Scattered slots are
 * gathered into memory of our own, and so is all that concerns guest memory: a guest may truncate it under a system call, and it
 * is wanted back at once when a front-end leaves. Commands wait in a queue, go to the connection that has least to do, and are ended
 * by libnbd's callback.
 *
 * A connection that breaks (the server has gone, its answer is garbage, its time is up) is closed, its commands go back to the
 * queue, and it is tried again for ever with growing pauses. Nothing fails meanwhile: how long to wait is the core's business.
 *
 * Invariants. A command is in one list: waiting, a link's, or ended. Writes that the server had acknowledged and not flushed when a
 * connection broke may be lost: the next flush then fails once, so that the core writes them again (`doubts`). A write that was sent
 * on a broken connection is sent again and may be executed twice, never after a newer one of ours has been acknowledged ... unless
 * the server goes on working at a connection that we have given up. Nobody can fence that off: docs/ARCHITECTURE.md says so.
 *
 * The loop is never the server's for long: one look takes in from its connections for TURN_NS, one recv() each, and gives them
 * TURN_BYTES. libnbd sends all that it has been handed, so it is handed data only when the command before is on its way.
 *
 * QEMU's compress filter answers EIO to what would change a cluster that is stored as it is, because it did not shrink. Such a
 * command goes to a second export of the same server, the image without that filter, over a link of its own. A flush covers both:
 * below the filter it is one image. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/queue.h>

#include "io.h"
#include "nbd_connect.h"
#include "nbd_holes.h"
#include "staging.h"

#define MAX_LINKS 16u
#define MAX_DATA_BYTES (32u << 20)  /* of one command: what every server takes that does not say otherwise */
#define MAX_ZERO_BYTES (128u << 20) /* a server may have to write them */
#define MAX_LINK_COMMANDS 64u       /* in flight on one connection */
#define MAX_LINK_BYTES (32u << 20)  /* the same; one command always goes */
#define FIRST_PAUSE_NS 100000000ull
#define LONGEST_PAUSE_NS 5000000000ull
#define TURN_NS 1000000ull          /* of taking in, in one look at the connections; one recv() more at most */
#define TURN_BYTES (1u << 20)       /* handed to the connections in one look; one command more at most */
#define COMMAND_COST 4096u          /* of one without data, of these */
#define STAGING_IDLE_NS 1000000000ull /* buffers that nobody needs so long are given up */
#define DRAIN_NS 1000000000ull    /* for answers, before a connection is left */
#define UNCOMPRESSED MAX_LINKS    /* the link to the second export, once it has been needed */
#define LINKS (MAX_LINKS + 1)
#define QUEUES 3u
#define ATTEMPT 256u /* watched descriptors of attempts are numbered from here on */

struct command {
    TAILQ_ENTRY(command) entry;
    struct io *io;
    struct link *link; /* that it was sent on, or NULL */
    uint8_t kind;      /* of the command: a zeroing I/O may have to be written */
    uint32_t staged;   /* the capacity of `memory`, where that is not the I/O's own; or 0 */
    bool scattered;    /* the pieces of a read have not come in order */
    bool uncompressed; /* to the second export */
    int error;         /* a positive errno */
    uint64_t offset;
    uint32_t bytes;
    uint64_t position; /* in the I/O */
    uint64_t seen;     /* bytes that the server has sent, of a read */
    void *memory;
    uint64_t doubts, covers; /* of a flush */
};
TAILQ_HEAD(commands, command);

/* A question about holes, which no I/O waits for. */
struct ask {
    TAILQ_ENTRY(ask) entry;
    struct nbd *owner;
    struct link *link; /* that it was sent on, or NULL */
    bool answered;
    struct question question;
};
TAILQ_HEAD(asks, ask);

struct link {
    struct nbd *owner;
    uint32_t index;
    struct nbd_handle *nbd; /* NULL: not connected */
    struct nbd_attempt *attempt;
    uint32_t watched; /* events */
    uint32_t ready;   /* those that have come, and wait for their turn */
    bool broken;
    bool stale; /* made when the export was smaller: it is left when it has nothing in flight */
    uint64_t retry_ns, pause_ns;
    struct commands sent;
    uint32_t commands;
    uint64_t bytes;
};

struct nbd {
    struct backend *backend;
    struct nbd_target *target;
    struct nbd_target *uncompressed; /* the second export, or NULL */
    bool uncompressed_needed;
    vhc_backend_facts facts; /* at the start */
    uint32_t max_bytes;
    bool can_zero, lost, refused, given_up, abandoned, closing;
    struct link links[LINKS];
    uint32_t wanted, up;
    uint32_t next_link; /* whose turn it is */
    bool some_ready;
    struct commands waiting[QUEUES]; /* what somebody waits for; the background; what goes to the second export */
    struct commands ended;
    struct holes *holes; /* or NULL: the server does not say */
    bool mute;           /* nor does it when asked */
    struct asks asks;
    uint32_t waiting_count;
    uint64_t written, flushed; /* commands that have succeeded; how many of them a flush has covered */
    uint64_t doubts, doubts_told;
    uint64_t leave_by_ns; /* stale links, whatever is in flight */
    struct staging staging;
    uint64_t staged_ns; /* when a buffer was given back to it last */
    vhc_backend_stats stats;
};

/* ---- an I/O and its commands: how many there still are, and the first error ---- */

static uint64_t *word_of(struct nbd *nbd, struct io *io)
{
    return &io->word[nbd->backend->level];
}

static void command_free(struct nbd *nbd, struct command *command)
{
    if (command->staged) {
        staging_give(&nbd->staging, command->memory, command->staged);
        nbd->staged_ns = nbd->backend->engine->now_ns;
        if (nbd->staging.count)
            backend_wake_at(nbd->backend, nbd->staged_ns + STAGING_IDLE_NS);
    }
    free(command);
}

/* error: a positive errno, or 0. */
static void command_finish(struct nbd *nbd, struct command *command, int error)
{
    struct io *io = command->io;
    uint64_t *word = word_of(nbd, io);
    if (error && !(*word >> 32))
        *word |= (uint64_t)(error & 0xfff) << 32;
    command_free(nbd, command);
    assert((uint32_t)*word);
    if (--*word & UINT32_MAX)
        return;
    if (nbd->holes && (io->kind == IO_WRITE || io->kind == IO_ZERO))
        holes_change_ends(nbd->holes, io->offset, io->bytes);
    backend_done(nbd->backend, io, -(int32_t)(*word >> 32));
}

static void enqueue(struct nbd *nbd, struct command *command, bool first)
{
    struct commands *queue = &nbd->waiting[command->uncompressed ? 2 : command->io->background];
    if (first)
        TAILQ_INSERT_HEAD(queue, command, entry);
    else
        TAILQ_INSERT_TAIL(queue, command, entry);
    command->link = NULL;
    nbd->waiting_count++;
}

static struct command *command_new(struct nbd *nbd, struct io *io, uint8_t kind, uint64_t position, uint64_t bytes)
{
    struct command *command = calloc(1, sizeof *command);
    assert(command); /* as for an I/O itself */
    command->io = io;
    command->kind = kind;
    command->offset = io->offset + position;
    command->position = position;
    command->bytes = (uint32_t)bytes;
    command->doubts = nbd->doubts;
    ++*word_of(nbd, io);
    return command;
}

/* Zeroes that have to be written: the same page of zeroes again and again. */
static void write_zeroes(struct nbd *nbd, struct io *io, uint64_t position, uint64_t bytes)
{
    uint64_t most = nbd->max_bytes < ZEROES_BYTES ? nbd->max_bytes : ZEROES_BYTES;
    for (uint64_t done = 0, part; done < bytes; done += part) {
        part = bytes - done < most ? bytes - done : most;
        struct command *command = command_new(nbd, io, IO_WRITE, 0, part);
        command->offset = io->offset + position + done;
        command->memory = nbd->backend->engine->zeroes;
        enqueue(nbd, command, false);
    }
    backend_wants_push(nbd->backend);
}

/* True: it is done. Otherwise the server may be asked what else there is, so that the next one is. */
static bool read_hole(struct nbd *nbd, struct io *io)
{
    struct question question;
    if (holes_cover(nbd->holes, io->offset, io->bytes)) {
        for (uint32_t i = 0; i < io->iov_count; i++)
            memset(io->iov[i].iov_base, 0, io->iov[i].iov_len);
        nbd->stats.hole_bytes += io->bytes;
        return true;
    }
    if (!nbd->mute && holes_ask(nbd->holes, io->offset, io->bytes, &question)) {
        struct ask *ask = calloc(1, sizeof *ask);
        assert(ask);
        ask->owner = nbd;
        ask->question = question;
        TAILQ_INSERT_TAIL(&nbd->asks, ask, entry);
    }
    return false;
}

static void nbd_submit(struct backend *backend, struct io *io)
{
    struct nbd *nbd = backend->state;
    *word_of(nbd, io) = 0;
    if (nbd->given_up) {
        backend_done(backend, io, -ESHUTDOWN);
        return;
    }
    if (io->kind == IO_FLUSH && nbd->doubts != nbd->doubts_told) {
        nbd->doubts_told = nbd->doubts;
        backend_done(backend, io, -ECONNRESET);
        return;
    }
    if (io->kind == IO_FLUSH && !nbd->facts.can_flush) {
        backend_done(backend, io, 0);
        return;
    }
    if (nbd->holes && io->kind == IO_READ && read_hole(nbd, io)) {
        backend_done(backend, io, 0);
        return;
    }
    if (nbd->holes && (io->kind == IO_WRITE || io->kind == IO_ZERO))
        holes_change_begins(nbd->holes, io->offset, io->bytes);
    if (io->kind == IO_ZERO && !nbd->can_zero) {
        write_zeroes(nbd, io, 0, io->bytes);
    } else if (io->kind == IO_FLUSH) {
        enqueue(nbd, command_new(nbd, io, IO_FLUSH, 0, 0), false);
    } else {
        uint64_t most = io->kind == IO_ZERO ? MAX_ZERO_BYTES : nbd->max_bytes;
        for (uint64_t done = 0, part; done < io->bytes; done += part) {
            part = io->bytes - done < most ? io->bytes - done : most;
            enqueue(nbd, command_new(nbd, io, io->kind, done, part), false);
        }
    }
    backend_wants_push(backend);
}

/* ---- memory ---- */

/* Between `memory` and the piece of the I/O that a command is about. */
static void copy_piece(const struct command *command, bool out)
{
    const struct io *io = command->io;
    const struct iovec *segment = io->iov;
    uint8_t *memory = command->memory;
    uint64_t skip = command->position, left = command->bytes;
    while (skip >= segment->iov_len)
        skip -= segment++->iov_len;
    for (; left; segment++, skip = 0) {
        uint64_t part = segment->iov_len - skip < left ? segment->iov_len - skip : left;
        if (out)
            memcpy((uint8_t *)segment->iov_base + skip, memory, part);
        else
            memcpy(memory, (const uint8_t *)segment->iov_base + skip, part);
        memory += part;
        left -= part;
    }
}

/* Where it is read to or written from. False: there is no memory now. */
static bool prepare(struct nbd *nbd, struct command *command)
{
    const struct io *io = command->io;
    if (command->memory || (command->kind != IO_READ && command->kind != IO_WRITE))
        return true;
    if (!io->request) {
        uint64_t skip = command->position;
        const struct iovec *segment = io->iov;
        while (skip >= segment->iov_len)
            skip -= segment++->iov_len;
        if (segment->iov_len - skip >= command->bytes) {
            command->memory = (uint8_t *)segment->iov_base + skip;
            return true;
        }
    }
    command->memory = staging_take(&nbd->staging, command->bytes, &command->staged);
    if (!command->memory)
        return false;
    nbd->stats.staged_bytes += command->bytes;
    if (command->kind == IO_WRITE)
        copy_piece(command, false);
    return true;
}

/* ---- to the server and back ---- */

/* libnbd calls these two, in the middle of its work. Nothing may be asked of libnbd here. It takes any number of pieces for one read,
 * also the same again and again without end, and leaves what none of them has said as the memory was before: that must not reach a
 * guest, so where they do not come in order the rest becomes zeroes first. */
static int on_piece(void *user, const void *data, size_t bytes, uint64_t offset, unsigned status, int *error)
{
    struct command *command = user;
    uint8_t *memory = command->memory;
    uint64_t position = offset - command->offset;
    (void)data, (void)error;
    if (status == LIBNBD_READ_ERROR)
        return 0;
    if (!bytes || position > command->bytes || bytes > command->bytes - position || command->seen + bytes > command->bytes) {
        command->link->broken = true;
        return 0;
    }
    if (!command->scattered && position != command->seen) {
        uint64_t end = position + bytes > command->seen ? position + bytes : command->seen;
        command->scattered = true;
        if (position > command->seen)
            memset(memory + command->seen, 0, position - command->seen);
        memset(memory + end, 0, command->bytes - end);
    }
    command->seen += bytes;
    return 0;
}

static int on_completion(void *user, int *error)
{
    struct command *command = user;
    command->error = *error;
    if (command->kind == IO_READ && !*error && command->seen != command->bytes) { /* the rest of the memory has never been written */
        command->error = EPROTO;
        command->link->broken = true;
    }
    TAILQ_REMOVE(&command->link->sent, command, entry);
    TAILQ_INSERT_TAIL(&command->link->owner->ended, command, entry);
    return 1; /* libnbd forgets it */
}

static int64_t hand_over(struct link *link, struct command *command)
{
    nbd_completion_callback callback = {.callback = on_completion, .user_data = command};
    nbd_chunk_callback piece = {.callback = on_piece, .user_data = command};
    switch (command->kind) {
    case IO_READ:
        return nbd_aio_pread_structured(link->nbd, command->memory, command->bytes, command->offset, piece, callback, 0);
    case IO_WRITE:
        return nbd_aio_pwrite(link->nbd, command->memory, command->bytes, command->offset, callback, 0);
    case IO_FLUSH:
        return nbd_aio_flush(link->nbd, callback, 0);
    default: /* never a trim: what it leaves may be read again */
        return nbd_aio_zero(link->nbd, command->bytes, command->offset, callback, command->io->may_unmap ? 0 : LIBNBD_CMD_FLAG_NO_HOLE);
    }
}

static bool is_dead(const struct link *link)
{
    return link->broken || nbd_aio_is_dead(link->nbd) || nbd_aio_is_closed(link->nbd);
}

static void count_in(struct nbd *nbd, struct link *link, struct command *command)
{
    command->link = link;
    link->commands++;
    link->bytes += command->bytes;
    nbd->stats.in_flight++;
    nbd->backend->engine->remote_ios++;
}

static void count_out(struct nbd *nbd, struct command *command)
{
    command->link->commands--;
    command->link->bytes -= command->bytes;
    nbd->stats.in_flight--;
    nbd->backend->engine->remote_ios--;
}

static void transmit(struct nbd *nbd, struct link *link, struct command *command)
{
    count_in(nbd, link, command);
    TAILQ_INSERT_TAIL(&link->sent, command, entry);
    nbd->stats.commands[command->kind]++;
    nbd->stats.bytes[command->kind] += command->bytes;
    command->covers = nbd->written;
    command->seen = 0;
    command->scattered = false;
    if (hand_over(link, command) >= 0)
        return;
    /* It was not even queued. */
    TAILQ_REMOVE(&link->sent, command, entry);
    command->error = is_dead(link) ? ENOTCONN : EIO;
    TAILQ_INSERT_TAIL(&nbd->ended, command, entry);
}

/* ---- questions about holes ---- */

static void count_ask(struct ask *ask, struct link *link, int by)
{
    struct nbd *nbd = ask->owner;
    link->commands += (uint32_t)by;
    nbd->stats.in_flight += (uint32_t)by;
    nbd->backend->engine->remote_ios += (uint32_t)by;
}

static void ask_over(struct ask *ask, bool good)
{
    holes_answered(ask->owner->holes, &ask->question, good);
    if (ask->link)
        count_ask(ask, ask->link, -1);
    TAILQ_REMOVE(&ask->owner->asks, ask, entry);
    free(ask);
}

/* libnbd calls these two, in the middle of its work. */
static int on_extents(void *user, const char *context, uint64_t offset, uint32_t *entries, size_t count, int *error)
{
    struct ask *ask = user;
    if (strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) == 0 && ask->answered)
        ask->link->broken = true; /* one answer, and not any number */
    ask->answered = true;
    for (size_t i = 0; i + 1 < count && !*error && strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) == 0; i += 2) {
        if (entries[i])
            holes_answer(ask->owner->holes, &ask->question, offset, entries[i], entries[i + 1] & LIBNBD_STATE_ZERO);
        offset += entries[i];
    }
    return 0;
}

static int on_answer(void *user, int *error)
{
    struct ask *ask = user;
    if (*error && *error != ENOTCONN && *error != ESHUTDOWN)
        ask->owner->mute = !holes_ask_less(ask->owner->holes, &ask->question);
    ask_over(ask, !*error);
    return 1;
}

static struct ask *first_unsent(struct nbd *nbd)
{
    struct ask *ask = TAILQ_FIRST(&nbd->asks);
    while (ask && ask->link)
        ask = TAILQ_NEXT(ask, entry);
    return ask;
}

static void send_ask(struct ask *ask, struct link *link)
{
    nbd_extent_callback extents = {.callback = on_extents, .user_data = ask};
    nbd_completion_callback answer = {.callback = on_answer, .user_data = ask};
    struct nbd *nbd = ask->owner;
    ask->link = link;
    count_ask(ask, link, 1);
    nbd->stats.commands[4]++;
    nbd->stats.bytes[4] += ask->question.bytes;
    /* Two answers may follow at once, from the call; if it says no, none does. */
    if (nbd_aio_block_status(link->nbd, ask->question.bytes, ask->question.offset, extents, answer, 0) < 0)
        ask_over(ask, false);
}

static bool is_wanted(const struct nbd *nbd, uint32_t index)
{
    return index < nbd->wanted || (index == UNCOMPRESSED && nbd->uncompressed_needed);
}

/* One that is in the midst of a command or an answer keeps what it is handed, and sends all of that at once: nothing but requests. */
static struct link *idlest(struct nbd *nbd, bool uncompressed, bool data)
{
    struct link *best = NULL;
    uint32_t first = uncompressed ? UNCOMPRESSED : 0, end = uncompressed ? LINKS : nbd->wanted;
    for (uint32_t i = first; i < end; i++) {
        struct link *link = &nbd->links[i];
        if (!link->nbd || link->commands == MAX_LINK_COMMANDS || (link->commands && link->bytes >= MAX_LINK_BYTES) || is_dead(link))
            continue;
        if (link->stale || (data && !nbd_aio_is_ready(link->nbd)))
            continue;
        if (!best || link->bytes < best->bytes || (link->bytes == best->bytes && link->commands < best->commands))
            best = link;
    }
    return best;
}

static void watch(struct nbd *nbd, struct link *link)
{
    unsigned direction = nbd_aio_get_direction(link->nbd);
    uint32_t events = (direction & LIBNBD_AIO_DIRECTION_READ ? EPOLLIN : 0) | (direction & LIBNBD_AIO_DIRECTION_WRITE ? EPOLLOUT : 0);
    if (events != link->watched)
        backend_watch_again(nbd->backend, link->index, nbd_aio_get_fd(link->nbd), events);
    link->watched = events;
}

/* A flush is no good once a doubt has come up since it was wanted. */
static bool doubtful(struct nbd *nbd, const struct command *command)
{
    if (command->kind != IO_FLUSH || command->doubts == nbd->doubts)
        return false;
    nbd->doubts_told = nbd->doubts;
    return true;
}

/* False: no connection takes any more, or `room` is used up. */
static bool pump_queue(struct nbd *nbd, struct commands *queue, uint32_t *room)
{
    struct command *command;
    while ((command = TAILQ_FIRST(queue))) {
        struct link *link = NULL;
        if (!*room)
            return false;
        bool wanted = !command->io->abandoned && !doubtful(nbd, command);
        if (wanted && !(link = idlest(nbd, command->uncompressed, command->kind == IO_WRITE)))
            return false;
        if (wanted && !prepare(nbd, command)) {
            backend_wake_at(nbd->backend, nbd->backend->engine->now_ns + FIRST_PAUSE_NS);
            return false;
        }
        TAILQ_REMOVE(queue, command, entry);
        nbd->waiting_count--;
        uint32_t cost = command->kind == IO_WRITE && command->bytes > COMMAND_COST ? command->bytes : COMMAND_COST;
        *room -= cost < *room ? cost : *room;
        if (wanted)
            transmit(nbd, link, command);
        else
            command_finish(nbd, command, command->io->abandoned ? ECANCELED : ECONNRESET);
    }
    return true;
}

/* Reads that nobody waits for need no connection to end. */
static void end_abandoned(struct nbd *nbd)
{
    struct command *command, *next;
    nbd->abandoned = false;
    for (uint32_t i = 0; i < QUEUES; i++) {
        for (command = TAILQ_FIRST(&nbd->waiting[i]); command; command = next) {
            next = TAILQ_NEXT(command, entry);
            if (!command->io->abandoned)
                continue;
            TAILQ_REMOVE(&nbd->waiting[i], command, entry);
            nbd->waiting_count--;
            command_finish(nbd, command, ECANCELED);
        }
    }
}

static void settle(struct nbd *nbd);

static void pump(struct nbd *nbd)
{
    if (nbd->abandoned)
        end_abandoned(nbd);
    uint32_t room = TURN_BYTES;
    if (pump_queue(nbd, &nbd->waiting[0], &room))
        pump_queue(nbd, &nbd->waiting[1], &room);
    pump_queue(nbd, &nbd->waiting[2], &room);
    if (!room && nbd->waiting_count)
        backend_wake_at(nbd->backend, 0); /* others first */
    struct ask *ask;
    struct link *link;
    while ((ask = first_unsent(nbd)) && (link = idlest(nbd, false, false)))
        send_ask(ask, link);
    for (uint32_t i = 0; i < LINKS; i++)
        if (nbd->links[i].nbd && !is_dead(&nbd->links[i]))
            watch(nbd, &nbd->links[i]);
}

static void nbd_push(struct backend *backend)
{
    struct nbd *nbd = backend->state;
    pump(nbd);
    settle(nbd); /* of connections that broke while we wrote to them */
}

static void succeeded(struct nbd *nbd, struct command *command)
{
    struct io *io = command->io;
    command->link->pause_ns = FIRST_PAUSE_NS;
    if (command->kind == IO_FLUSH) {
        if (command->covers > nbd->flushed)
            nbd->flushed = command->covers;
    } else if (command->kind != IO_READ) {
        nbd->written++;
    } else if (command->staged && !io->abandoned) {
        copy_piece(command, true);
    }
}

static void send_uncompressed(struct nbd *nbd, struct command *command)
{
    command->error = 0;
    command->uncompressed = true;
    enqueue(nbd, command, false);
    if (!nbd->uncompressed_needed) {
        nbd->uncompressed_needed = true;
        backend_wake_at(nbd->backend, 0);
    }
    backend_wants_push(nbd->backend);
}

/* A server may be unable to zero at all, or here: QEMU 7.2 fails to zero a part of a cluster behind its compress filter. */
static bool zero_by_writing(const struct command *command)
{
    return command->kind == IO_ZERO && (command->error == ENOTSUP || command->error == EIO || command->error == EINVAL);
}

static void answered(struct nbd *nbd, struct command *command)
{
    if (doubtful(nbd, command)) {
        command_finish(nbd, command, ECONNRESET);
    } else if (command->error == EIO && nbd->uncompressed && !command->uncompressed && command->kind != IO_READ && command->kind != IO_FLUSH) {
        send_uncompressed(nbd, command);
    } else if (zero_by_writing(command)) {
        if (command->error == ENOTSUP)
            nbd->can_zero = false;
        write_zeroes(nbd, command->io, command->position, command->bytes);
        command_finish(nbd, command, 0);
    } else {
        if (command->error)
            nbd->stats.errors++;
        else
            succeeded(nbd, command);
        command_finish(nbd, command, command->error);
    }
}

/* In front of what waits already. Called for the youngest first. */
static void send_again(struct nbd *nbd, struct command *command)
{
    command->error = 0;
    nbd->stats.repeated++;
    enqueue(nbd, command, true);
}

static void schedule(struct nbd *nbd, struct link *link)
{
    link->retry_ns = clock_ns() + link->pause_ns;
    link->pause_ns = link->pause_ns * 2 < LONGEST_PAUSE_NS ? link->pause_ns * 2 : LONGEST_PAUSE_NS;
    backend_wake_at(nbd->backend, link->retry_ns);
}

static void tell_lost(struct nbd *nbd, const char *why)
{
    if (nbd->up || nbd->given_up || (nbd->lost && strcmp(nbd->backend->message, why) == 0))
        return;
    nbd->lost = true;
    nbd->refused = false;
    backend_event(nbd->backend, VHC_BACKEND_LOST, "%s", why);
}

static void drop_link(struct nbd *nbd, struct link *link)
{
    struct command *command;
    int fd = nbd_aio_get_fd(link->nbd);
    if (fd >= 0)
        watch_remove(nbd->backend->engine, fd);
    nbd_close(link->nbd); /* calls nobody back */
    link->nbd = NULL;
    link->broken = link->stale = false;
    link->ready = 0;
    if (link->index != UNCOMPRESSED)
        nbd->up--;
    struct ask *ask, *next;
    for (ask = TAILQ_FIRST(&nbd->asks); ask; ask = next) {
        next = TAILQ_NEXT(ask, entry);
        if (ask->link == link)
            ask_over(ask, false);
    }
    while ((command = TAILQ_LAST(&link->sent, commands))) {
        TAILQ_REMOVE(&link->sent, command, entry);
        count_out(nbd, command);
        if (nbd->closing) /* the I/O is gone already */
            command_free(nbd, command);
        else
            send_again(nbd, command);
    }
}

/* What came over it is as it is after a loss: a flush on another connection may cover nothing of it. */
static void leave_link(struct nbd *nbd, struct link *link)
{
    if (nbd->holes)
        holes_forget(nbd->holes); /* a server that has lost what it had written may have lost zeroes */
    drop_link(nbd, link);
    if (nbd->written > nbd->flushed) {
        nbd->doubts++;
        nbd->flushed = nbd->written; /* until more is written there is nothing more to doubt */
    }
    backend_wants_push(nbd->backend);
}

static void link_lost(struct nbd *nbd, struct link *link)
{
    nbd->stats.losses++;
    leave_link(nbd, link);
    schedule(nbd, link);
    tell_lost(nbd, "the connection has broken");
}

/* What libnbd has ended, and the connections that have. */
static void settle(struct nbd *nbd)
{
    struct command *command;
    struct commands again = TAILQ_HEAD_INITIALIZER(again);
    while ((command = TAILQ_FIRST(&nbd->ended))) {
        TAILQ_REMOVE(&nbd->ended, command, entry);
        count_out(nbd, command);
        if (command->error == ESHUTDOWN) /* the server is about to end */
            command->link->broken = true;
        if (command->error && is_dead(command->link))
            TAILQ_INSERT_TAIL(&again, command, entry);
        else
            answered(nbd, command);
    }
    while ((command = TAILQ_LAST(&again, commands))) {
        TAILQ_REMOVE(&again, command, entry);
        send_again(nbd, command);
    }
    for (uint32_t i = 0; i < LINKS; i++)
        if (nbd->links[i].nbd && is_dead(&nbd->links[i]))
            link_lost(nbd, &nbd->links[i]);
}

/* ---- connections ---- */

static bool same_export(struct nbd *nbd, const vhc_backend_facts *now, char *error, size_t error_bytes)
{
    const vhc_backend_facts *then = &nbd->facts;
    const char *what = NULL;
    if (now->size_bytes < nbd->backend->facts.size_bytes)
        what = "is smaller than it was";
    else if (now->align_io_bytes > then->align_io_bytes)
        what = "asks for larger blocks than it did";
    else if (now->read_only && !then->read_only)
        what = "is read-only now";
    else if (now->max_bytes && now->max_bytes < nbd->max_bytes)
        what = "takes smaller requests only"; /* what waits is cut already */
    else if (!now->can_flush && then->can_flush)
        what = "cannot be flushed any more";
    if (what)
        snprintf(error, error_bytes, "the export %s: %llu bytes in blocks of %u, it was %llu in %u", what, (unsigned long long)now->size_bytes,
                 now->align_io_bytes, (unsigned long long)nbd->backend->facts.size_bytes, then->align_io_bytes);
    return !what;
}

static bool link_up(struct nbd *nbd, struct link *link, struct nbd_handle *handle, const vhc_backend_facts *facts)
{
    link->nbd = handle;
    link->broken = false;
    link->watched = EPOLLIN;
    link->retry_ns = BACKEND_NEVER;
    if (!backend_watch(nbd->backend, link->index, nbd_aio_get_fd(handle), EPOLLIN)) {
        nbd_close(handle);
        link->nbd = NULL;
        return false;
    }
    nbd->stats.connects++;
    if (link->index == UNCOMPRESSED)
        return true;
    nbd->up++;
    if (!facts->can_multi_conn) {
        nbd->wanted = 1; /* a flush on it covers nothing of the others' */
        for (uint32_t i = 1; i < MAX_LINKS; i++)
            nbd->links[i].broken = true;
        backend_wants_push(nbd->backend);
    }
    if (!facts->can_zero)
        nbd->can_zero = false;
    return true;
}

static void start_attempt(struct nbd *nbd, struct link *link)
{
    link->retry_ns = BACKEND_NEVER;
    link->attempt = nbd_attempt_start(link->index == UNCOMPRESSED ? nbd->uncompressed : nbd->target);
    if (!link->attempt) {
        schedule(nbd, link);
    } else if (!backend_watch(nbd->backend, ATTEMPT + link->index, nbd_attempt_fd(link->attempt), EPOLLIN)) {
        nbd_attempt_abandon(link->attempt);
        link->attempt = NULL;
        schedule(nbd, link);
    }
}

static void attempt_over(struct nbd *nbd, struct link *link)
{
    vhc_backend_facts facts;
    bool refused = false;
    char error[sizeof nbd->backend->message];
    watch_remove(nbd->backend->engine, nbd_attempt_fd(link->attempt));
    struct nbd_handle *handle = nbd_attempt_finish(link->attempt, &facts, &refused, error, sizeof error);
    link->attempt = NULL;
    if (!is_wanted(nbd, link->index)) { /* not any more */
        nbd_close(handle);
        return;
    }
    if (!handle || !same_export(nbd, &facts, error, sizeof error)) {
        schedule(nbd, link);
        if (link->index == UNCOMPRESSED) {
            /* the other links say what is the matter */
        } else if (!handle && !refused) {
            tell_lost(nbd, error);
        } else if (!nbd->up && !(nbd->refused && strcmp(nbd->backend->message, error) == 0)) {
            nbd->lost = nbd->refused = true;
            backend_event(nbd->backend, VHC_BACKEND_REFUSED, "%s", error);
        }
        nbd_close(handle);
        return;
    }
    if (!link_up(nbd, link, handle, &facts)) {
        schedule(nbd, link);
        return;
    }
    backend_wants_push(nbd->backend);
    if (link->index == UNCOMPRESSED)
        return;
    if (nbd->lost)
        backend_event(nbd->backend, VHC_BACKEND_CONNECTED, "connected again");
    nbd->lost = nbd->refused = false;
}

static void serve_link(struct link *link, uint32_t events)
{
    /* What these return does not matter: the state says what has become of it. */
    unsigned direction = nbd_aio_get_direction(link->nbd);
    bool hang_up = events & (EPOLLHUP | EPOLLERR);
    if (direction & LIBNBD_AIO_DIRECTION_READ && (events & EPOLLIN || hang_up))
        nbd_aio_notify_read(link->nbd);
    else if (direction & LIBNBD_AIO_DIRECTION_WRITE && (events & EPOLLOUT || hang_up))
        nbd_aio_notify_write(link->nbd);
}

/* What is ready, in turn. Those that are left are reported again, and begin. */
static void serve(struct nbd *nbd)
{
    uint64_t until_ns = clock_ns() + TURN_NS;
    bool in_time = true;
    for (uint32_t n = 0, first = nbd->next_link; n < LINKS; n++) {
        struct link *link = &nbd->links[(first + n) % LINKS];
        uint32_t events = link->ready;
        link->ready = 0;
        if (!events || !in_time || !link->nbd || is_dead(link))
            continue;
        serve_link(link, events);
        nbd->next_link = (link->index + 1) % LINKS;
        in_time = clock_ns() < until_ns;
    }
    settle(nbd);
    backend_wants_push(nbd->backend);
}

static void nbd_ready(struct backend *backend, uint32_t index, uint32_t events)
{
    struct nbd *nbd = backend->state;
    struct link *link = &nbd->links[index % ATTEMPT];
    if (index >= ATTEMPT) {
        if (link->attempt)
            attempt_over(nbd, link);
        return;
    }
    if (!link->nbd)
        return;
    link->ready |= events;
    nbd->some_ready = true;
    backend_wake_at(backend, 0); /* when all that is ready is known */
}

/* Links that do not know how large the export is now. A server may fall over a client that leaves in the middle. */
static uint64_t leave_stale(struct nbd *nbd, uint64_t now_ns)
{
    uint64_t next_ns = BACKEND_NEVER;
    for (uint32_t i = 0; i < LINKS; i++) {
        struct link *link = &nbd->links[i];
        if (!link->nbd || !link->stale)
            continue;
        if (link->commands && now_ns < nbd->leave_by_ns) {
            next_ns = nbd->leave_by_ns;
            continue;
        }
        if (!link->commands && !is_dead(link))
            nbd_aio_disconnect(link->nbd, 0); /* as is polite */
        leave_link(nbd, link);
        link->retry_ns = 0;
    }
    return next_ns;
}

static uint64_t nbd_tick(struct backend *backend, uint64_t now_ns)
{
    struct nbd *nbd = backend->state;
    if (nbd->some_ready)
        serve(nbd);
    nbd->some_ready = false;
    uint64_t next_ns = leave_stale(nbd, now_ns);
    for (uint32_t i = 0; i < LINKS && !nbd->given_up; i++) {
        struct link *link = &nbd->links[i];
        if (!is_wanted(nbd, i))
            continue;
        if (link->retry_ns <= now_ns && !link->nbd && !link->attempt)
            start_attempt(nbd, link);
        if (link->retry_ns < next_ns)
            next_ns = link->retry_ns;
    }
    for (uint32_t i = 0; i < LINKS; i++) {
        uint64_t due_ns = nbd->links[i].attempt ? nbd_attempt_look(nbd->links[i].attempt, now_ns) : BACKEND_NEVER;
        if (due_ns < next_ns)
            next_ns = due_ns;
    }
    if (nbd->staging.count && nbd->staged_ns + STAGING_IDLE_NS <= now_ns)
        staging_clear(&nbd->staging);
    else if (nbd->staging.count && nbd->staged_ns + STAGING_IDLE_NS < next_ns)
        next_ns = nbd->staged_ns + STAGING_IDLE_NS;
    if (nbd->waiting_count)
        backend_wants_push(backend);
    return next_ns;
}

static bool nbd_abandon(struct backend *backend, struct io *io)
{
    struct nbd *nbd = backend->state;
    nbd->stats.abandoned++;
    nbd->abandoned = true;
    backend_wants_push(backend);
    return true; /* guest memory is touched in copy_piece() only */
}

static void disconnect(struct nbd *nbd)
{
    for (uint32_t i = 0; i < LINKS; i++) {
        struct link *link = &nbd->links[i];
        if (link->attempt) {
            watch_remove(nbd->backend->engine, nbd_attempt_fd(link->attempt));
            nbd_attempt_abandon(link->attempt);
        }
        link->attempt = NULL;
        if (link->nbd && !link->commands && !is_dead(link))
            nbd_aio_disconnect(link->nbd, 0); /* as is polite */
        if (link->nbd)
            drop_link(nbd, link);
    }
}

/* A server may fall over a client that leaves in the middle (nbdkit 1.32 does). */
static void nbd_drain(struct backend *backend)
{
    struct nbd *nbd = backend->state;
    uint64_t deadline_ns = clock_ns() + DRAIN_NS;
    while (nbd->stats.in_flight && clock_ns() < deadline_ns) {
        struct pollfd fds[LINKS] = {0};
        for (uint32_t i = 0; i < LINKS; i++)
            fds[i] = (struct pollfd){.fd = nbd->links[i].nbd ? nbd_aio_get_fd(nbd->links[i].nbd) : -1, .events = (short)nbd->links[i].watched};
        if (poll(fds, LINKS, DRAIN_NS / 10 / 1000000) < 0 && errno != EINTR)
            break;
        for (uint32_t i = 0; i < LINKS; i++) {
            if (nbd->links[i].nbd && fds[i].revents)
                serve_link(&nbd->links[i], (uint32_t)fds[i].revents);
            if (nbd->links[i].nbd && !is_dead(&nbd->links[i]))
                watch(nbd, &nbd->links[i]);
        }
        settle(nbd);
    }
}

static void nbd_give_up(struct backend *backend)
{
    struct nbd *nbd = backend->state;
    struct command *command;
    nbd->given_up = true;
    disconnect(nbd);
    for (uint32_t i = 0; i < QUEUES; i++) {
        while ((command = TAILQ_FIRST(&nbd->waiting[i]))) {
            TAILQ_REMOVE(&nbd->waiting[i], command, entry);
            nbd->waiting_count--;
            command_finish(nbd, command, ESHUTDOWN);
        }
    }
}

static void nbd_read_stats(struct backend *backend, vhc_backend_stats *stats)
{
    struct nbd *nbd = backend->state;
    *stats = nbd->stats;
    stats->waiting = nbd->waiting_count;
    stats->connections = nbd->up;
}

static void nbd_end(struct backend *backend)
{
    struct nbd *nbd = backend->state;
    struct command *command;
    nbd->closing = true;
    disconnect(nbd);
    for (uint32_t i = 0; i < QUEUES; i++) {
        while ((command = TAILQ_FIRST(&nbd->waiting[i]))) {
            TAILQ_REMOVE(&nbd->waiting[i], command, entry);
            command_free(nbd, command);
        }
    }
    while (!TAILQ_EMPTY(&nbd->asks))
        ask_over(TAILQ_FIRST(&nbd->asks), false);
    holes_free(nbd->holes);
    staging_clear(&nbd->staging);
    nbd_target_release(nbd->target);
    if (nbd->uncompressed)
        nbd_target_release(nbd->uncompressed);
    free(nbd);
}

static const struct backend_ops nbd_ops = {
    .name = "nbd",
    .submit = nbd_submit,
    .push = nbd_push,
    .tick = nbd_tick,
    .ready = nbd_ready,
    .abandon = nbd_abandon,
    .drain = nbd_drain,
    .give_up = nbd_give_up,
    .read_stats = nbd_read_stats,
    .close = nbd_end,
};

void vhc_backend_nbd_renew(vhc_backend *backend, uint64_t size_bytes)
{
    while (backend->below)
        backend = backend->below;
    struct nbd *nbd = backend->state;
    assert(backend->ops == &nbd_ops && size_bytes >= backend->facts.size_bytes);
    backend->facts.size_bytes = size_bytes; /* connections to a smaller one are refused from now on */
    nbd->leave_by_ns = clock_ns() + DRAIN_NS;
    for (uint32_t i = 0; i < LINKS; i++)
        nbd->links[i].stale = nbd->links[i].nbd != NULL;
    backend_wake_at(backend, 0);
}

/* A connection that no backend has yet. */
struct nbd_link {
    struct nbd_target *target;
    struct nbd_handle *handle;
    vhc_backend_facts facts;
};

vhc_nbd_link *vhc_nbd_connect(const vhc_nbd_config *config, vhc_backend_facts *facts, char *error, size_t error_bytes)
{
    struct nbd_link *link = calloc(1, sizeof *link);
    snprintf(error, error_bytes, "out of memory");
    if (link)
        link->target = nbd_target_new(config, error, error_bytes);
    if (link && link->target)
        link->handle = nbd_connect_now(link->target, &link->facts, error, error_bytes);
    if (!link || !link->handle) {
        vhc_nbd_disconnect(link);
        return NULL;
    }
    *facts = link->facts;
    return link;
}

void vhc_nbd_disconnect(vhc_nbd_link *link)
{
    if (!link)
        return;
    if (link->handle)
        nbd_aio_disconnect(link->handle, 0); /* as is polite */
    nbd_close(link->handle);
    if (link->target)
        nbd_target_release(link->target);
    free(link);
}

static struct backend *make(vhc_engine *engine, struct nbd_target *target, const vhc_backend_facts *facts, char *error, size_t error_bytes)
{
    struct nbd *nbd = calloc(1, sizeof *nbd);
    struct backend *backend = nbd ? backend_new(engine, &nbd_ops, NULL, error, error_bytes) : NULL;
    if (!backend) {
        snprintf(error, error_bytes, "out of memory");
        free(nbd);
        return NULL;
    }
    backend->state = nbd;
    backend->facts = nbd->facts = *facts;
    nbd->backend = backend;
    nbd->target = target;
    nbd->max_bytes = facts->max_bytes && facts->max_bytes < MAX_DATA_BYTES ? facts->max_bytes : MAX_DATA_BYTES;
    nbd->can_zero = facts->can_zero;
    for (uint32_t i = 0; i < QUEUES; i++)
        TAILQ_INIT(&nbd->waiting[i]);
    TAILQ_INIT(&nbd->ended);
    TAILQ_INIT(&nbd->asks);
    for (uint32_t i = 0; i < LINKS; i++) {
        struct link *link = &nbd->links[i];
        link->owner = nbd;
        link->index = i;
        link->pause_ns = FIRST_PAUSE_NS;
        link->retry_ns = 0;
        TAILQ_INIT(&link->sent);
    }
    return backend;
}

vhc_backend *vhc_backend_nbd(vhc_engine *engine, const vhc_nbd_config *config, vhc_nbd_link *first, char *error, size_t error_bytes)
{
    struct nbd_link link = *first;
    struct backend *backend = make(engine, link.target, &link.facts, error, error_bytes);
    if (!backend) {
        vhc_nbd_disconnect(first);
        return NULL;
    }
    free(first);
    struct nbd *nbd = backend->state;
    if (config->uncompressed_uri) {
        vhc_nbd_config second = *config;
        second.uri = config->uncompressed_uri;
        nbd->uncompressed = nbd_target_new(&second, error, error_bytes);
        if (!nbd->uncompressed) {
            nbd_close(link.handle);
            vhc_backend_close(backend);
            return NULL;
        }
    }
    if (nbd_can_meta_context(link.handle, LIBNBD_CONTEXT_BASE_ALLOCATION) > 0)
        nbd->holes = holes_new(link.facts.size_bytes);
    nbd->wanted = config->connections > MAX_LINKS ? MAX_LINKS : config->connections ? config->connections : 1;
    if (!link_up(nbd, &nbd->links[0], link.handle, &link.facts)) {
        snprintf(error, error_bytes, "the connection cannot be watched: %s", strerror(errno));
        vhc_backend_close(backend);
        return NULL;
    }
    if (nbd->wanted > 1)
        backend_wake_at(backend, 0); /* the others, as soon as the loop runs */
    return backend;
}
