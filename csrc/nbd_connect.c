/* Connecting to an NBD server, in threads: name resolution, TLS and negotiation must never hold up the engine's loop, and a server
 * that accepts a connection may say nothing for ever.
 *
 * A thread touches its attempt and its target, nothing of the engine. When it is over the connection belongs to whoever finishes the
 * attempt; an attempt that nobody wants any more is freed by its thread.
 *
 * In the midst of the negotiation libnbd reads as long as there is something to read, and a server may send without end. So who waits for
 * an attempt, or has no use for it any more, ends it by shutting its socket down. */
#include "nbd_connect.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define TIMEOUT_NS 10000000000ull /* from the connection to the end of the negotiation */
#define LOOK_MS 200               /* how often an attempt finds out that nobody wants it */
#define ERROR_BYTES 256

struct nbd_target {
    atomic_uint references;
    char *uri, *certificates, *psk_file, *username;
    bool verify, read_only;
};

struct nbd_attempt {
    struct nbd_target *target;
    pthread_mutex_t mutex;
    bool over, abandoned, refused, late;
    uint64_t deadline_ns;
    int event_fd, socket; /* -1: there is none yet; a descriptor of its own, which is closed with the attempt */
    struct nbd_handle *nbd;
    vhc_backend_facts facts;
    char error[ERROR_BYTES];
};

static bool copy_text(char **to, const char *from)
{
    *to = from && *from ? strdup(from) : NULL;
    return *to || !from || !*from;
}

static bool begins(const char *text, const char *with)
{
    return strncmp(text, with, strlen(with)) == 0;
}

/* libnbd would take what it cannot do for nothing. */
static const char *problem(const struct nbd_target *target)
{
    bool tls = begins(target->uri, "nbds");
    if (!begins(target->uri, "nbd:") && !begins(target->uri, "nbd+") && !tls)
        return "the URI does not begin with nbd:, nbd+unix:, nbds: or nbds+unix:";
    if (!tls && (target->certificates || target->psk_file || target->username))
        return "TLS is configured, and the URI does not ask for it: nbds:// or nbds+unix://";
    if (begins(target->uri, "nbds+unix:") && target->verify && !target->psk_file && !strstr(target->uri, "tls-psk-file="))
        return "a certificate names a host, and a unix socket has none: use a PSK file, or tls_verify: off";
    if (target->certificates && target->psk_file)
        return "certificates or a PSK file: one of them";
    return NULL;
}

struct nbd_target *nbd_target_new(const vhc_nbd_config *config, char *error, size_t error_bytes)
{
    struct nbd_target *target = calloc(1, sizeof *target);
    if (target)
        target->references = 1;
    if (!target || !config->uri || !copy_text(&target->uri, config->uri) || !copy_text(&target->certificates, config->tls_certificates) ||
        !copy_text(&target->psk_file, config->tls_psk_file) || !copy_text(&target->username, config->tls_username) || !target->uri) {
        snprintf(error, error_bytes, "no URI, or out of memory");
        if (target)
            nbd_target_release(target);
        return NULL;
    }
    target->verify = config->tls_verify;
    target->read_only = config->read_only;
    const char *what = problem(target);
    if (what) {
        snprintf(error, error_bytes, "%s", what);
        nbd_target_release(target);
        return NULL;
    }
    return target;
}

void nbd_target_release(struct nbd_target *target)
{
    if (atomic_fetch_sub(&target->references, 1) != 1)
        return;
    free(target->uri);
    free(target->certificates);
    free(target->psk_file);
    free(target->username);
    free(target);
}

/* libnbd's own words, in one line. */
static void say_why(char *error, size_t error_bytes)
{
    const char *text = nbd_get_error(), *function_end;

    /* "nbd_aio_connect_uri: connect: Connection refused": the function is nobody's business. */
    if (text && !strncmp(text, "nbd_", 4) && (function_end = strstr(text, ": ")))
        text = function_end + 2;
    snprintf(error, error_bytes, "%s", text && *text ? text : "the server does not speak NBD");
    for (char *at = error; *at; at++)
        if (*at == '\n' || *at == '\r')
            *at = ' ';
}

static bool set_up(struct nbd_handle *nbd, const struct nbd_target *target)
{
    /* The choke point has seen to what libnbd would check. Of alignment the server may ask more than it needs. */
    return nbd_set_strict_mode(nbd, LIBNBD_STRICT_MASK & ~LIBNBD_STRICT_ALIGN) == 0 &&
           nbd_set_pread_initialize(nbd, false) == 0 && /* backend_nbd.c looks at what has come */
           nbd_set_uri_allow_local_file(nbd, true) == 0 && nbd_set_tls_verify_peer(nbd, target->verify) == 0 &&
           (!target->certificates || nbd_set_tls_certificates(nbd, target->certificates) == 0) &&
           (!target->psk_file || nbd_set_tls_psk_file(nbd, target->psk_file) == 0) &&
           (!target->username || nbd_set_tls_username(nbd, target->username) == 0) &&
           nbd_add_meta_context(nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) == 0 && nbd_aio_connect_uri(nbd, target->uri) == 0;
}

/* One step of the negotiation. False: it has failed. */
static bool negotiate(struct nbd_handle *nbd)
{
    unsigned direction = nbd_aio_get_direction(nbd);
    struct pollfd socket = {.fd = nbd_aio_get_fd(nbd)};
    if (direction & LIBNBD_AIO_DIRECTION_READ)
        socket.events |= POLLIN;
    if (direction & LIBNBD_AIO_DIRECTION_WRITE)
        socket.events |= POLLOUT;
    if (socket.fd < 0)
        return false;
    if (poll(&socket, 1, LOOK_MS) <= 0)
        return true;
    if (direction & LIBNBD_AIO_DIRECTION_READ && socket.revents & (POLLIN | POLLHUP | POLLERR))
        return nbd_aio_notify_read(nbd) == 0;
    return nbd_aio_notify_write(nbd) == 0;
}

/* A server that has vanished without a word is noticed within half a minute. */
static void watch_peer(int fd)
{
    int domain = 0, on = 1, idle_s = 10, interval_s = 5, probes = 4, unanswered_ms = 30000;
    socklen_t bytes = sizeof domain;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &bytes) < 0 || (domain != AF_INET && domain != AF_INET6))
        return;
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof interval_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unanswered_ms, sizeof unanswered_ms);
}

static uint32_t block_size(struct nbd_handle *nbd, int which)
{
    int64_t bytes = nbd_get_block_size(nbd, which);
    return bytes <= 0 ? 0 : bytes > UINT32_MAX ? UINT32_MAX : (uint32_t)bytes;
}

static int note_answer(void *user, int *error)
{
    *(int *)user = *error ? -1 : 1;
    return 1;
}

/* A server may say that its smallest block is large, as qemu-storage-daemon does of compressed clusters, and do with smaller ones all the
 * same, reading the rest and writing it again. Ask by reading. */
static bool pads_blocks(struct nbd_handle *nbd)
{
    static char block[VBLK_SECTOR];
    int answer = 0;
    uint64_t deadline_ns = clock_ns() + TIMEOUT_NS;
    nbd_completion_callback callback = {.callback = note_answer, .user_data = &answer};
    if (nbd_aio_pread(nbd, block, sizeof block, VBLK_SECTOR, callback, 0) < 0)
        return false;
    while (!answer && clock_ns() < deadline_ns && negotiate(nbd))
        ;
    return answer > 0;
}

static bool read_facts(struct nbd_handle *nbd, const struct nbd_target *target, vhc_backend_facts *facts, char *error, size_t error_bytes)
{
    int64_t size = nbd_get_size(nbd);
    uint32_t smallest = block_size(nbd, LIBNBD_SIZE_MINIMUM), most = block_size(nbd, LIBNBD_SIZE_MAXIMUM);
    const char *what = NULL;
    if (size <= 0 || size % VBLK_SECTOR)
        what = "is no multiple of 512, or empty";
    else if (smallest > VHC_BLOCK && !pads_blocks(nbd))
        what = "cannot be read in blocks of 4096 bytes: use a filter of the server's that pads (nbdkit's blocksize)";
    else if (smallest && (__builtin_popcount(smallest) != 1 || size % (smallest > VHC_BLOCK ? VBLK_SECTOR : smallest)))
        what = "is no multiple of the server's smallest block";
    else if (nbd_is_read_only(nbd) && !target->read_only)
        what = "is read-only: use --read-only (read_only: on), or let the server allow writing";
    if (what) {
        snprintf(error, error_bytes, "the export of %lld bytes (smallest block %u) %s", (long long)size, smallest, what);
        return false;
    }
    most = most / VHC_BLOCK * VHC_BLOCK;
    uint32_t align = smallest <= VHC_BLOCK ? smallest : size % VHC_BLOCK ? VBLK_SECTOR : VHC_BLOCK;
    *facts = (vhc_backend_facts){
        .size_bytes = (uint64_t)size,
        .align_mem_bytes = 1,
        .align_io_bytes = align ? align : 1,
        .preferred_bytes = smallest > block_size(nbd, LIBNBD_SIZE_PREFERRED) ? smallest : block_size(nbd, LIBNBD_SIZE_PREFERRED),
        .wants_whole_objects = smallest > VHC_BLOCK,
        .max_bytes = most,
        .read_only = nbd_is_read_only(nbd) > 0,
        .can_flush = nbd_can_flush(nbd) > 0,
        .can_zero = nbd_can_zero(nbd) > 0,
        .can_trim = nbd_can_trim(nbd) > 0,
        .can_fua = nbd_can_fua(nbd) > 0,
        .can_multi_conn = nbd_can_multi_conn(nbd) > 0,
        .can_abandon = 1,
        .rotational = nbd_is_rotational(nbd) > 0,
    };
    return true;
}

/* The socket may have changed: an address after the other is tried. False: nobody waits any longer. */
static bool reach(struct nbd_attempt *attempt, int fd)
{
    pthread_mutex_lock(&attempt->mutex);
    if (attempt->socket >= 0)
        close(attempt->socket);
    attempt->socket = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    attempt->late |= clock_ns() > attempt->deadline_ns;
    bool wanted = !attempt->abandoned && !attempt->late;
    pthread_mutex_unlock(&attempt->mutex);
    return wanted;
}

/* attempt->refused: there is a server, and its export cannot be used. */
static struct nbd_handle *connect_to(struct nbd_attempt *attempt)
{
    struct nbd_target *target = attempt->target;
    struct nbd_handle *nbd = nbd_create();
    bool good = nbd && set_up(nbd, target), wanted = true;
    while (good && nbd_aio_is_connecting(nbd) && wanted) {
        wanted = reach(attempt, nbd_aio_get_fd(nbd));
        good = wanted && negotiate(nbd);
    }
    pthread_mutex_lock(&attempt->mutex);
    wanted = !attempt->abandoned && !attempt->late;
    pthread_mutex_unlock(&attempt->mutex);
    if (good && wanted && nbd_aio_is_ready(nbd)) {
        watch_peer(nbd_aio_get_fd(nbd));
        if (read_facts(nbd, target, &attempt->facts, attempt->error, sizeof attempt->error))
            return nbd;
        attempt->refused = true;
    } else if (!wanted) {
        snprintf(attempt->error, sizeof attempt->error, "the server did not answer within 10 s");
    } else {
        say_why(attempt->error, sizeof attempt->error);
    }
    nbd_close(nbd);
    return NULL;
}

static void attempt_free(struct nbd_attempt *attempt)
{
    nbd_close(attempt->nbd);
    if (attempt->socket >= 0)
        close(attempt->socket);
    close(attempt->event_fd);
    nbd_target_release(attempt->target);
    pthread_mutex_destroy(&attempt->mutex);
    free(attempt);
}

static void *work(void *argument)
{
    struct nbd_attempt *attempt = argument;
    uint64_t one = 1;
    attempt->nbd = connect_to(attempt);
    pthread_mutex_lock(&attempt->mutex);
    bool abandoned = attempt->abandoned;
    attempt->over = true;
    if (!abandoned && write(attempt->event_fd, &one, sizeof one) < 0)
        abort(); /* an eventfd that was zero takes a one */
    pthread_mutex_unlock(&attempt->mutex);
    if (abandoned)
        attempt_free(attempt);
    return NULL;
}

static bool start_thread(struct nbd_attempt *attempt)
{
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all, before; /* signals are the main thread's */
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int result = pthread_create(&thread, &attributes, work, attempt);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return result == 0;
}

struct nbd_attempt *nbd_attempt_start(struct nbd_target *target)
{
    struct nbd_attempt *attempt = calloc(1, sizeof *attempt);
    if (!attempt)
        return NULL;
    attempt->target = target;
    attempt->socket = -1;
    attempt->deadline_ns = clock_ns() + TIMEOUT_NS;
    atomic_fetch_add(&target->references, 1);
    pthread_mutex_init(&attempt->mutex, NULL);
    attempt->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (attempt->event_fd < 0 || !start_thread(attempt)) {
        attempt_free(attempt);
        return NULL;
    }
    return attempt;
}

static void hang_up(struct nbd_attempt *attempt)
{
    if (attempt->socket >= 0)
        shutdown(attempt->socket, SHUT_RDWR);
}

uint64_t nbd_attempt_look(struct nbd_attempt *attempt, uint64_t now_ns)
{
    uint64_t due_ns = attempt->deadline_ns + LOOK_MS * 1000000ull; /* it notices by itself, if it can */
    pthread_mutex_lock(&attempt->mutex);
    if (!attempt->over && now_ns >= due_ns) {
        attempt->late = true;
        hang_up(attempt);
        due_ns = now_ns + LOOK_MS * 1000000ull;
    }
    pthread_mutex_unlock(&attempt->mutex);
    return due_ns;
}

int nbd_attempt_fd(const struct nbd_attempt *attempt)
{
    return attempt->event_fd;
}

struct nbd_handle *nbd_attempt_finish(struct nbd_attempt *attempt, vhc_backend_facts *facts, bool *refused, char *error, size_t error_bytes)
{
    pthread_mutex_lock(&attempt->mutex); /* the thread may still hold it, after its last word */
    assert(attempt->over);
    pthread_mutex_unlock(&attempt->mutex);
    struct nbd_handle *nbd = attempt->nbd;
    attempt->nbd = NULL;
    *facts = attempt->facts;
    *refused = attempt->refused;
    snprintf(error, error_bytes, "%s", attempt->error);
    attempt_free(attempt);
    return nbd;
}

void nbd_attempt_abandon(struct nbd_attempt *attempt)
{
    pthread_mutex_lock(&attempt->mutex);
    attempt->abandoned = true;
    bool over = attempt->over;
    if (!over)
        hang_up(attempt);
    pthread_mutex_unlock(&attempt->mutex);
    if (over)
        attempt_free(attempt);
}

struct nbd_handle *nbd_connect_now(struct nbd_target *target, vhc_backend_facts *facts, char *error, size_t error_bytes)
{
    bool refused;
    struct nbd_attempt *attempt = nbd_attempt_start(target);
    struct pollfd over = {.fd = attempt ? attempt->event_fd : -1, .events = POLLIN};
    if (!attempt) {
        snprintf(error, error_bytes, "no thread could be had to connect in");
        return NULL;
    }
    while (poll(&over, 1, LOOK_MS) <= 0)
        nbd_attempt_look(attempt, clock_ns());
    return nbd_attempt_finish(attempt, facts, &refused, error, error_bytes);
}
