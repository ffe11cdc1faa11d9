/* Fuzz target: a front-end. One real engine, its socket, guest memory in a memfd, rings; a core that answers. The input is a program of
 * steps: messages of every sort (with any numbers, sizes, descriptors), requests and broken rings, memory changed or truncated under the
 * engine's hands, disconnects. The engine may disconnect this front-end at any time; it may not crash, hang, lose a request or keep a
 * descriptor or a mapping. */
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_ring.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/sockios.h>

#include "fuzz.h"
#include "internal.h"

enum {
    MEMORY = 256 << 10,
    HALF = MEMORY / 2,
    AREA = 64 << 10,
    QUEUES = 2,
    QUEUE_BYTES = 0x3000, /* descriptors, avail, used: a page each */
    AVAIL = 0x1000,
    USED = 0x2000,
    TABLES = 0x6000, /* indirect tables */
    DATA = 0x8000,
    SLOTS = 32,
    CAPACITY = (1 << 20) + 512,
    MAX_STEPS = 200,
    PATIENCE = 4000, /* turns of a millisecond until a connection must have been settled */
};
#define GUEST 0x100000ull        /* where memory begins for the guest */
#define USER 0x7f0000000000ull   /* and for the front-end */
#define VERSION 1u
#define ASLEEP_NS 3000000000ull
#define NEED_REPLY 8u

/* The front-end's side. */
static vhc_engine *engine;
static struct sockaddr_un address;
static socklen_t address_bytes;
static int memory_fd, area_fd, log_fd, kick_fd, call_fd, null_fd, pipe_fds[2], readonly_fd, huge_fd, sealed_fd, backend_fd;
static uint8_t *memory;
static uint32_t memory_bytes; /* what is left of it */
static int front_end = -1, given_area_fd = -1;
static uint16_t avail[QUEUES];
static uint32_t queue_size;
static uint64_t runs;
static bool confused; /* something was sent that is no message: whatever follows means anything */

/* --- the core's side --- */

struct held {
    uint32_t tag, kind, sectors, group;
    uint64_t sector;
    bool reading, ended;
};
static struct held held[2 * VIRTQUEUE_MAX_SIZE + 1];
static uint32_t held_count;
static bool groups[64]; /* in flight */
static bool connected, must_settle, may_drop, write_cache_heard;
static uint64_t operations[8192];
static uint32_t words;

static int free_group(void)
{
    for (int i = 0; i < 64; i++)
        if (!groups[i])
            return i;
    return -1;
}

static uint64_t op(uint64_t code, uint64_t name, uint64_t arg)
{
    return code | name << 8 | arg << 32;
}

static void emit(uint64_t word)
{
    REQUIRE(words < 8192);
    operations[words++] = word;
}

static void run(int64_t timeout_ns)
{
    vhc_turn_result result;
    vhc_turn(engine, operations, words, timeout_ns, &result);
    words = 0;
    for (uint32_t i = 0; i < result.events; i++) {
        switch (result.event_kind[i]) {
        case VHC_EV_CONNECTED:
            REQUIRE(!connected);
            connected = true;
            break;
        case VHC_EV_DISCONNECTED:
            REQUIRE(connected && !held_count);
            connected = false;
            break;
        case VHC_EV_WCE:
            write_cache_heard = true;
            break;
        case VHC_EV_QUIESCE:
            must_settle = true;
            may_drop = result.event_arg[i];
            break;
        }
    }
    if (result.requests) /* the engine takes none before what it had is settled */
        must_settle = may_drop = false;
    for (uint32_t i = 0; i < result.requests; i++) {
        REQUIRE(held_count < sizeof(held) / sizeof(*held) - 1);
        struct held *one = &held[held_count++];
        *one = (struct held){.tag = result.tag[i], .kind = result.what[i] & 255, .sectors = result.sectors[i], .sector = result.sector[i]};
        for (uint32_t j = 0; j + 1 < held_count; j++)
            REQUIRE(held[j].tag != one->tag);
        REQUIRE(one->kind <= VHC_REQ_ZERO_UNMAP);
        if (one->kind != VHC_REQ_FLUSH)
            REQUIRE(one->sectors && one->sector < CAPACITY / 512 && one->sectors <= CAPACITY / 512 - one->sector);
    }
    for (uint32_t i = 0; i < result.completions; i++) {
        uint32_t group = result.done_group[i];
        REQUIRE(group < 64 && groups[group] && result.done_volume[i] == 0);
        groups[group] = false;
        for (uint32_t j = 0; j < held_count; j++)
            if (held[j].reading && held[j].group == group)
                held[j].ended = true;
    }
    if (!held_count)
        must_settle = may_drop = false;
}

/* The request's blocks: slots again and again. */
static void emit_slots(uint64_t code, const struct held *one, uint32_t skip)
{
    uint32_t bytes = one->sectors * 512, count = (skip + bytes + 4095) / 4096;
    emit(op(code, one->tag, count));
    emit((uint64_t)bytes << 32);
    emit(skip);
    for (uint32_t i = 0; i < count; i++)
        emit(VHC_FIRST_SLOT + (i * 5 + one->tag) % (SLOTS - VHC_FIRST_SLOT));
}

/* Answer one request, or begin to. False if it has to wait. */
static bool answer(struct held *one, uint8_t how)
{
    int group = free_group();
    uint32_t skip = how >> 4 & 1 ? 512u * (how >> 5) : 0;
    if (one->reading) {
        if (!one->ended && must_settle && may_drop && how & 8) { /* while the kernel still writes to its memory */
            emit(op(VHC_OP_DROP, one->tag, 0));
            return true;
        }
        if (!one->ended)
            return false;
        emit(op(VHC_OP_COMPLETE, one->tag, 0));
        return true;
    }
    if (words > 4096)
        return false;
    if (how % 8 == 7 && must_settle && may_drop) {
        emit(op(VHC_OP_DROP, one->tag, 0));
        return true;
    }
    if (how % 8 == 6) {
        emit(op(VHC_OP_COMPLETE, one->tag, how >> 4 & 1 ? 1 : 2));
        return true;
    }
    switch (one->kind) {
    case VHC_REQ_READ:
        if (how % 8 < 3 && group >= 0) {
            emit(op(VHC_OP_READ_DIRECT, one->tag, 0));
            emit((uint64_t)group);
            emit(one->sector * 512);
            emit(one->sectors * 512);
            groups[group] = one->reading = true;
            one->group = (uint32_t)group;
            return false;
        }
        if (one->sectors == 8 && how % 8 == 3) {
            emit(op(VHC_OP_OUT1, one->tag, 1 + how % 4));
            return true;
        }
        emit_slots(VHC_OP_OUT, one, skip);
        break;
    case VHC_REQ_WRITE:
        if (one->sectors == 8 && how % 8 < 3) {
            emit(op(VHC_OP_IN1, one->tag, VHC_FIRST_SLOT + how % 8));
            return true;
        }
        emit_slots(VHC_OP_IN, one, skip);
        if (how % 8 == 5 && group >= 0 && one->sectors == 8) {
            emit(op(VHC_OP_WRITE, 0, 1));
            emit((uint64_t)group);
            emit(one->sector * 512);
            emit(4096);
            emit(VHC_FIRST_SLOT + 2);
            groups[group] = true;
        }
        break;
    case VHC_REQ_FLUSH:
        if (how % 8 < 2 && group >= 0) {
            emit(op(VHC_OP_FLUSH, 0, 0));
            emit((uint64_t)group);
            groups[group] = true;
        }
        break;
    default:
        if (how % 8 < 3 && group >= 0) {
            emit(op(VHC_OP_ZERO, 0, one->kind != VHC_REQ_ZERO));
            emit((uint64_t)group);
            emit(one->sector * 512);
            emit(one->sectors * 512ull);
            groups[group] = true;
        }
    }
    emit(op(VHC_OP_COMPLETE, one->tag, 0));
    return true;
}

static void answer_some(uint32_t count, uint8_t how)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < held_count; i++)
        if (i >= count || !answer(&held[i], (uint8_t)(how + i)))
            held[kept++] = held[i];
    held_count = kept;
}

static void turn(void)
{
    run(0);
    if (must_settle || held_count > 64)
        answer_some(UINT32_MAX, take8());
}

/* --- the front-end's socket --- */

static void read_replies(void)
{
    for (;;) {
        char buffer[4096], control[CMSG_SPACE(8 * sizeof(int))];
        struct iovec iov = {buffer, sizeof(buffer)};
        struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
        ssize_t bytes = recvmsg(front_end, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (bytes <= 0)
            return;
        for (struct cmsghdr *one = CMSG_FIRSTHDR(&header); one; one = CMSG_NXTHDR(&header, one)) {
            int fd;
            REQUIRE(one->cmsg_type == SCM_RIGHTS && one->cmsg_len == CMSG_LEN(sizeof(int)));
            memcpy(&fd, CMSG_DATA(one), sizeof(int));
            if (given_area_fd >= 0)
                close(given_area_fd);
            given_area_fd = fd;
        }
    }
}

/* Send, and let the engine take it. */
static void send_bytes(const void *data, size_t bytes, const int *fds, uint32_t fd_count)
{
    char control[CMSG_SPACE(12 * sizeof(int))] = {0};
    struct iovec iov = {(void *)data, bytes};
    struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd_count) {
        header.msg_control = control;
        header.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
        struct cmsghdr *one = CMSG_FIRSTHDR(&header);
        one->cmsg_level = SOL_SOCKET;
        one->cmsg_type = SCM_RIGHTS;
        one->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(one), fds, fd_count * sizeof(int));
    }
    (void)!sendmsg(front_end, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
    for (int i = 0, left = 1; i < 6 && left > 0; i++) {
        turn();
        if (ioctl(front_end, SIOCOUTQ, &left) < 0)
            break;
    }
    read_replies();
}

static void send_message(uint32_t number, uint32_t flags, const void *payload, uint32_t bytes, const int *fds, uint32_t fd_count)
{
    uint8_t data[12 + 4096];
    uint32_t header[3] = {number, VERSION | flags, bytes};
    memcpy(data, header, 12);
    if (bytes)
        memcpy(data + 12, payload, bytes);
    send_bytes(data, 12 + bytes, fds, fd_count);
}

static void send_u64(uint32_t number, uint64_t value)
{
    send_message(number, 0, &value, 8, NULL, 0);
}

static void send_state(uint32_t number, uint32_t index, uint32_t num)
{
    uint32_t state[2] = {index, num};
    send_message(number, 0, state, 8, NULL, 0);
}

static int pick_fd(uint8_t choice)
{
    const int fds[] = {kick_fd,    call_fd, memory_fd,   null_fd, pipe_fds[1], area_fd, readonly_fd, huge_fd,
                       backend_fd, log_fd,  front_end,   sealed_fd, given_area_fd >= 0 ? given_area_fd : area_fd};
    return fds[choice % (sizeof(fds) / sizeof(*fds))];
}

/* --- numbers that mean something --- */

static uint64_t pick_number(void)
{
    uint8_t choice = take8();
    switch (choice % 12) {
    case 0: return take64();
    case 1: return UINT64_MAX - take16();
    case 2: return GUEST + take16() * 16u;
    case 3: return USER + take16() * 16u;
    case 4: return GUEST + HALF - take8() % 64;
    case 5: return USER + HALF - take8() % 64;
    case 6: return take8();
    case 7: return (uint64_t)take8() << 12;
    case 8: return GUEST + MEMORY - take8();
    case 9: return 1ull << take8() % 64;
    case 10: return take32();
    default: return take16();
    }
}

static VhostUserMemoryRegion half_of_memory(uint32_t half)
{
    return (VhostUserMemoryRegion){GUEST + half * HALF, HALF, USER + half * HALF, half * HALF};
}

static VhostUserMemoryRegion pick_region(uint8_t choice)
{
    VhostUserMemoryRegion region = half_of_memory(choice & 1);
    if (choice & 2)
        region.guest_phys_addr = pick_number();
    if (choice & 4)
        region.memory_size = pick_number();
    if (choice & 8)
        region.userspace_addr = pick_number();
    if (choice & 16)
        region.mmap_offset = pick_number();
    return region;
}

static void send_mem_table(uint32_t count, const VhostUserMemoryRegion *regions, const int *fds, uint32_t fd_count)
{
    VhostUserMemory table = {.nregions = count};
    memcpy(table.regions, regions, 8 * sizeof(*regions));
    send_message(VHOST_USER_SET_MEM_TABLE, NEED_REPLY, &table, (uint32_t)(8 + (count < 8 ? count : 8) * sizeof(*regions)), fds, fd_count);
}

/* --- rings --- */

static bool in_memory(uint64_t at, uint64_t bytes)
{
    return at <= memory_bytes && bytes <= memory_bytes - at;
}

static void poke(uint64_t at, const void *data, uint64_t bytes)
{
    if (in_memory(at, bytes))
        memcpy(memory + at, data, bytes);
}

static void set_desc(uint32_t table, uint32_t index, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
    struct vring_desc desc = {addr, len, flags, next};
    poke(table + index * sizeof(desc), &desc, sizeof(desc));
}

static void offer(uint32_t queue, uint16_t head)
{
    uint32_t ring = queue * QUEUE_BYTES + AVAIL;
    poke(ring + 4 + 2 * (avail[queue] % queue_size), &head, 2);
    avail[queue]++;
    poke(ring + 2, &avail[queue], 2);
}

static uint32_t pick_segment(void)
{
    static const uint32_t usual[] = {512, 4096, 1024, 8192, 16, 100, 65536, 0};
    uint8_t choice = take8();
    return choice < 240 ? usual[choice % 8] : (uint32_t)pick_number();
}

/* A request, mostly a good one: header, data, status in one chain or an indirect table. */
static void make_request(void)
{
    static const uint32_t types[] = {0, 1, 0, 1, 4, 8, 11, 13};
    uint8_t choice = take8(), shape = take8();
    uint32_t queue = choice >> 7, type = types[choice & 7], head = take8() % queue_size;
    uint32_t header[4] = {choice & 8 ? take32() : type, 0, 0, 0};
    uint64_t sector = take8() < 200 ? take16() % (CAPACITY / 512) : pick_number();
    memcpy(header + 2, &sector, 8);
    uint32_t at = DATA + 64 * (queue * 256 + head), table = queue * QUEUE_BYTES, index = head, segments = shape & 3;
    bool writes = type == 0 || type == 8, indirect = shape & 4;
    poke(at, header, 16);
    if (type == 11 || type == 13) {
        uint32_t range[4] = {(uint32_t)sector, 0, 1u + take16() % 4096, take8() % 3};
        poke(at + 16, range, 16);
        segments = shape & 8 ? segments : 1;
    }
    if (indirect) {
        uint32_t bytes = 16 * (segments + 2);
        uint64_t where = GUEST + TABLES + 128 * (head % 64);
        if (shape & 16) { /* a table over the edge of a region, or anywhere */
            where = pick_number();
            bytes = shape & 32 ? (uint32_t)pick_number() : bytes;
        }
        set_desc(table, head, where, bytes, VRING_DESC_F_INDIRECT, 0);
        table = (uint32_t)(where - GUEST < MEMORY ? where - GUEST : TABLES);
        index = 0;
    }
#define NEXT (indirect ? index + 1 : (index + 1) % queue_size)
    set_desc(table, index, GUEST + at, 16, VRING_DESC_F_NEXT, (uint16_t)NEXT);
    for (uint32_t i = 0; i < segments; i++) {
        index = NEXT;
        uint32_t bytes = type == 11 || type == 13 ? 16 : pick_segment();
        uint64_t where = type == 11 || type == 13 ? GUEST + at + 16 : shape & 64 ? pick_number() : GUEST + DATA + 0x8000 + 4096u * (take8() % 24);
        set_desc(table, index, where, bytes, (uint16_t)(VRING_DESC_F_NEXT | (writes ? VRING_DESC_F_WRITE : 0)), (uint16_t)NEXT);
    }
    index = NEXT;
    set_desc(table, index, GUEST + at + 48, shape & 128 ? pick_segment() : 1, VRING_DESC_F_WRITE, 0);
    offer(queue, (uint16_t)head);
}

static void send_vring_addr(uint32_t index, uint64_t desc, uint64_t avail_ring, uint64_t used, uint32_t flags, uint64_t log)
{
    struct vhost_vring_addr addr = {index, flags, desc, used, avail_ring, log};
    send_message(VHOST_USER_SET_VRING_ADDR, 0, &addr, sizeof(addr), NULL, 0);
}

static void start_queue(uint32_t queue)
{
    uint64_t base = USER + queue * QUEUE_BYTES, index = queue;
    send_state(VHOST_USER_SET_VRING_NUM, queue, queue_size);
    send_state(VHOST_USER_SET_VRING_BASE, queue, avail[queue]);
    send_vring_addr(queue, base, base + AVAIL, base + USED, 0, 0);
    send_message(VHOST_USER_SET_VRING_CALL, 0, &index, 8, &call_fd, 1);
    send_message(VHOST_USER_SET_VRING_KICK, 0, &index, 8, &kick_fd, 1);
}

static void send_area(bool set, uint8_t choice)
{
    VhostUserInflight area = {AREA, 0, QUEUES, (uint16_t)queue_size};
    if (choice & 1)
        area.mmap_size = pick_number();
    if (choice & 2)
        area.mmap_offset = pick_number();
    if (choice & 4)
        area.num_queues = take16();
    if (choice & 8)
        area.queue_size = take16();
    int fd = choice & 16 ? pick_fd(take8()) : choice & 32 ? pick_fd(12) : area_fd;
    if (choice & 32)
        area.mmap_size = (16 * queue_size + 2 + 63) / 64 * 64 * QUEUES;
    send_message(set ? VHOST_USER_SET_INFLIGHT_FD : VHOST_USER_GET_INFLIGHT_FD, 0, &area, sizeof(area), &fd, set);
}

/* What every good front-end does first. */
static void handshake(uint8_t choice)
{
    static const uint32_t sizes[] = {16, 8, 128, 2};
    queue_size = sizes[choice & 3];
    send_u64(VHOST_USER_GET_FEATURES, 0);
    send_u64(VHOST_USER_SET_PROTOCOL_FEATURES, choice & 4 ? 1ull << 0 | 1ull << 1 | 1ull << 3 | 1ull << 9 | 1ull << 12 : 1ull << 3);
    send_u64(VHOST_USER_SET_FEATURES, 1ull << 32 | (choice & 8 ? 1ull << 29 : 0) | (choice & 16 ? 1ull << 26 : 0) | 1ull << 28 | 1ull << 30);
    VhostUserMemoryRegion regions[8] = {half_of_memory(0), half_of_memory(1)};
    send_mem_table(2, regions, (int[]){memory_fd, memory_fd}, 2);
    if (choice & 4)
        send_area(true, 0);
    for (uint32_t i = 0; i < QUEUES && choice & (32u << i); i++)
        start_queue(i);
}

static bool alive(void)
{
    char byte;
    return recv(front_end, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0 || errno == EAGAIN;
}

static void connect_again(void)
{
    confused = false;
    front_end = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    REQUIRE(front_end >= 0 && connect(front_end, (struct sockaddr *)&address, address_bytes) == 0);
    for (int i = 0; i < PATIENCE && !connected; i++)
        run(1000000);
    REQUIRE(connected);
}

/* Leave, and see that the engine lets go of everything. */
static void leave(void)
{
    close(front_end);
    front_end = -1;
    for (int i = 0; i < PATIENCE; i++) {
        bool busy = false;
        for (int group = 0; group < 64; group++)
            busy = busy || groups[group];
        if (!connected && !busy && !held_count)
            return;
        answer_some(UINT32_MAX, 3);
        run(1000000);
    }
    FINDING("the engine does not let go: connected %d, %u requests held", connected, held_count);
}

static void send_anything(void)
{
    uint8_t payload[4096], how = take8();
    confused = true;
    uint32_t number = take8() % 64, bytes = how & 1 ? take8() : take16() % 4096, header_bytes = bytes, fd_count = how >> 4 & 7;
    int fds[12];
    memset(payload, 0, sizeof(payload));
    for (uint32_t i = 0; i < bytes && i < 80; i++)
        payload[i] = take8();
    for (uint32_t i = 0; i < fd_count; i++)
        fds[i] = pick_fd(take8());
    if (how & 2)
        header_bytes = take32();
    uint32_t header[3] = {number == 63 ? take32() : number, take8(), header_bytes};
    uint8_t data[12 + sizeof(payload)];
    memcpy(data, header, 12);
    memcpy(data + 12, payload, bytes);
    uint32_t cut = how & 4 ? take16() % (12 + bytes) : 0;
    if (cut)
        send_bytes(data, cut, NULL, 0);
    send_bytes(data + cut, 12 + bytes - cut, fds, fd_count);
}

static void step(void)
{
    uint8_t code = take8();
    switch (code % 29) {
    case 0:
    case 1:
    case 2:
    case 3:
        make_request();
        if (code & 128)
            turn();
        break;
    case 4:
        turn();
        break;
    case 5:
    case 6: {
        uint32_t count = take8();
        answer_some(count, take8());
        turn();
        break;
    }
    case 7:
        send_anything();
        break;
    case 8: {
        uint8_t choice = take8();
        VhostUserMemoryRegion regions[8];
        int fds[8];
        uint32_t count = choice % 4, fd_count = choice & 4 ? take8() % 9 : count;
        for (uint32_t i = 0; i < 8; i++) {
            regions[i] = i < count ? pick_region(choice & 8 ? take8() : (uint8_t)i & 1) : half_of_memory(0);
            fds[i] = choice & 16 ? pick_fd(take8()) : memory_fd;
        }
        send_mem_table(choice & 32 ? take32() : count, regions, fds, fd_count);
        break;
    }
    case 9:
    case 10: {
        uint8_t choice = take8();
        VhostUserMemRegMsg one = {0, pick_region(choice)};
        int fd = choice & 32 ? pick_fd(take8()) : memory_fd;
        bool add = code % 29 == 9;
        send_message(add ? VHOST_USER_ADD_MEM_REG : VHOST_USER_REM_MEM_REG, NEED_REPLY, &one, sizeof(one), &fd, add || choice & 64);
        break;
    }
    case 11: {
        static const uint32_t numbers[] = {VHOST_USER_SET_VRING_NUM, VHOST_USER_SET_VRING_BASE, VHOST_USER_GET_VRING_BASE, VHOST_USER_SET_VRING_ENABLE};
        uint8_t choice = take8();
        send_state(numbers[choice & 3], choice & 4 ? (uint32_t)pick_number() : choice >> 7, choice & 8 ? (uint32_t)pick_number() : queue_size);
        break;
    }
    case 12: {
        uint8_t choice = take8();
        uint64_t base = USER + (choice >> 7) * QUEUE_BYTES;
        send_vring_addr(choice & 1 ? take8() : choice >> 7, choice & 2 ? pick_number() : base, choice & 4 ? pick_number() : base + AVAIL,
                        choice & 8 ? pick_number() : base + USED, choice & 16, choice & 32 ? pick_number() : 0);
        break;
    }
    case 13: {
        uint8_t choice = take8();
        uint64_t index = choice & 16 ? pick_number() : choice >> 7;
        int fd = pick_fd(choice & 8 ? take8() : 0);
        send_message(VHOST_USER_SET_VRING_KICK + (choice & 3) % 3, choice & 32 ? NEED_REPLY : 0, &index, 8, &fd, !(choice & 4));
        break;
    }
    case 14:
        start_queue(code & 128 ? 1 : 0);
        break;
    case 15: {
        uint8_t choice = take8();
        send_area(!(choice & 64), choice);
        break;
    }
    case 16: {
        VhostUserLog log = {AREA, 0};
        uint8_t choice = take8();
        if (choice & 1)
            log.mmap_size = pick_number();
        if (choice & 2)
            log.mmap_offset = pick_number();
        int fd = choice & 4 ? pick_fd(take8()) : log_fd;
        if (choice & 8)
            send_message(VHOST_USER_SET_LOG_FD, 0, NULL, 0, &fd, 1);
        else
            send_message(VHOST_USER_SET_LOG_BASE, 0, &log, sizeof(log), &fd, 1);
        break;
    }
    case 17: {
        uint8_t choice = take8();
        send_u64(choice & 1 ? VHOST_USER_SET_FEATURES : VHOST_USER_SET_PROTOCOL_FEATURES,
                 choice & 2 ? pick_number() : choice & 4 ? 1ull << 32 | 1ull << 26 | 1ull << 28 : 1ull << 12);
        break;
    }
    case 18: {
        uint32_t config[3 + 64] = {take8(), take8() % 64 * 4u, 0};
        uint8_t choice = take8();
        if (choice & 1)
            config[1] = take32();
        if (choice & 2)
            config[0] = 32, config[1] = 1;
        config[3] = take32();
        uint32_t bytes = 12 + (choice & 4 ? take8() : config[1] < 256 ? config[1] : 256);
        send_message(choice & 8 ? VHOST_USER_SET_CONFIG : VHOST_USER_GET_CONFIG, 0, config, bytes, NULL, 0);
        break;
    }
    case 19: { /* any bytes anywhere */
        uint32_t at = take32() % MEMORY, bytes = take8() % 16;
        uint8_t data[16];
        for (uint32_t i = 0; i < bytes; i++)
            data[i] = take8();
        poke(at, data, bytes);
        break;
    }
    case 20: { /* a descriptor, in a table or an indirect one */
        uint8_t choice = take8();
        uint32_t table = choice & 1 ? TABLES + 128 * (take8() % 64) : (choice >> 7) * QUEUE_BYTES;
        uint32_t index = take8() % 128;
        uint64_t where = pick_number();
        uint32_t bytes = choice & 2 ? (uint32_t)pick_number() : pick_segment();
        set_desc(table, index, where, bytes, choice & 4 ? take16() : choice >> 3 & 7, take8());
        break;
    }
    case 21: { /* ring indexes */
        uint8_t choice = take8();
        uint32_t queue = choice >> 7;
        uint16_t value = choice & 1 ? take16() : take8();
        if (choice & 2)
            offer(queue, value);
        else if (choice & 4)
            poke(queue * QUEUE_BYTES + USED + 2, &value, 2);
        else
            poke(queue * QUEUE_BYTES + AVAIL + 2, &value, 2);
        break;
    }
    case 22: { /* the in-flight area */
        uint8_t choice = take8();
        uint32_t at = choice & 1 ? take16() : choice & 2 ? 8 + take8() % 8 : 16 + 16u * (take8() % 128);
        uint64_t value = choice & 4 ? take64() : 1;
        (void)!pwrite(choice & 8 && given_area_fd >= 0 ? given_area_fd : area_fd, &value, choice & 16 ? 8 : 2, at);
        break;
    }
    case 23: { /* memory goes */
        uint8_t choice = take8();
        uint32_t bytes = choice & 4 ? take8() * 4096u % MEMORY : 0;
        switch (choice & 3) {
        case 0:
        case 1:
            if (ftruncate(memory_fd, bytes) == 0)
                memory_bytes = bytes < memory_bytes ? bytes : memory_bytes;
            break;
        case 2:
            (void)!ftruncate(area_fd, choice & 8 ? bytes : 0);
            break;
        case 3:
            (void)!ftruncate(log_fd, 0);
            break;
        }
        break;
    }
    case 24: {
        uint8_t choice = take8();
        leave();
        memset(avail, 0, sizeof(avail));
        for (uint32_t i = 0; i < QUEUES; i++)
            if (in_memory(i * QUEUE_BYTES + USED, 4)) /* as a guest that lives on, or one that starts anew */
                memcpy(&avail[i], memory + i * QUEUE_BYTES + (choice & 128 ? AVAIL : USED) + 2, 2);
        connect_again();
        handshake(choice);
        break;
    }
    case 26: { /* the write cache, switched by an idle guest: nothing else may be needed to hear of it */
        uint32_t message[7] = {VHOST_USER_SET_CONFIG, VERSION, 13, 32, 1, 0, code >> 7};
        turn();
        write_cache_heard = confused || held_count || !alive() || send(front_end, message, 25, MSG_DONTWAIT | MSG_NOSIGNAL) != 25;
        uint64_t sent_ns = clock_ns();
        while (!write_cache_heard && !held_count && connected) {
            run(ASLEEP_NS);
            if (!write_cache_heard && !held_count && connected && clock_ns() - sent_ns >= ASLEEP_NS) /* no signal has ended the turn */
                FINDING("the engine sleeps over a message");
        }
        break;
    }
    case 27: /* one kick for all queues, on a descriptor that blocks again */
        (void)!fcntl(kick_fd, F_SETFL, 0);
        (void)!eventfd_write(kick_fd, 1);
        turn();
        break;
    case 28: /* a table of descriptors at the very end of memory */
        send_vring_addr(code >> 7, USER + MEMORY - 16 * queue_size, USER + (code >> 7) * QUEUE_BYTES + AVAIL,
                        USER + (code >> 7) * QUEUE_BYTES + USED, 0, 0);
        break;
    case 25:
        (void)!eventfd_write(code & 128 ? kick_fd : call_fd, 1);
        vhc_set_write_cache(engine, 0, code & 64);
        turn();
        break;
    }
}

/* --- around it --- */

/* What the engine maps of files gets pages on both sides that cannot be touched: AddressSanitizer knows only its own memory. */
#define FENCE (1 << 20)
void *__real_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *address, size_t bytes);
void *__wrap_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);
int __wrap_munmap(void *address, size_t bytes);
static void *fenced[256];

void *__wrap_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    uint32_t place = 0;
    if (address || fd < 0)
        return __real_mmap(address, bytes, protection, flags, fd, offset);
    while (fenced[place])
        place++;
    REQUIRE(place < sizeof(fenced) / sizeof(*fenced) - 1);
    size_t whole = (bytes + 4095) / 4096 * 4096;
    uint8_t *room = whole < bytes ? MAP_FAILED : __real_mmap(NULL, whole + 2 * FENCE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return MAP_FAILED;
    void *there = __real_mmap(room + FENCE, bytes, protection, flags | MAP_FIXED, fd, offset);
    if (there == MAP_FAILED) {
        int problem = errno;
        __real_munmap(room, whole + 2 * FENCE);
        errno = problem;
        return MAP_FAILED;
    }
    fenced[place] = there;
    return there;
}

int __wrap_munmap(void *address, size_t bytes)
{
    for (uint32_t i = 0; i < sizeof(fenced) / sizeof(*fenced); i++) {
        if (fenced[i] != address || !address)
            continue;
        fenced[i] = NULL;
        return __real_munmap((uint8_t *)address - FENCE, (bytes + 4095) / 4096 * 4096 + 2 * FENCE);
    }
    return __real_munmap(address, bytes);
}

static unsigned count_fds(void)
{
    unsigned count = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (readdir(folder))
        count++;
    closedir(folder);
    return count;
}

/* Mappings of what front-ends share: only ours may be left. */
static unsigned count_mappings(void)
{
    static char text[1 << 20];
    unsigned count = 0;
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    size_t bytes = 0;
    for (ssize_t part; bytes < sizeof(text) - 1 && (part = read(fd, text + bytes, sizeof(text) - 1 - bytes)) > 0;)
        bytes += (size_t)part;
    close(fd);
    text[bytes] = 0;
    for (const char *at = text; (at = strstr(at, "/memfd:")); at++)
        count++;
    return count;
}

static int memory_file(const char *name, off_t bytes)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    REQUIRE(fd >= 0 && ftruncate(fd, bytes) == 0);
    return fd;
}

/* A SIGBUS that the engine does not forgive has to look like a crash, so that its input is kept. */
static void (*engines_handler)(int, siginfo_t *, void *);

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    struct sigaction now;
    engines_handler(number, info, context);
    sigaction(SIGBUS, NULL, &now);
    if (now.sa_sigaction != on_sigbus)
        FINDING("SIGBUS at %p", info->si_addr);
}

static void set_up(void)
{
    char error[256];
    vhc_engine_config config = {.poll_max_us = 0};
    int listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    address.sun_family = AF_UNIX; /* an abstract name, chosen by the kernel */
    REQUIRE(bind(listen_fd, (struct sockaddr *)&address, sizeof(sa_family_t)) == 0 && listen(listen_fd, 4) == 0);
    address_bytes = sizeof(address);
    REQUIRE(getsockname(listen_fd, (struct sockaddr *)&address, &address_bytes) == 0);
    signal(SIGPIPE, SIG_IGN);
    memory_fd = memory_file("fuzz-memory", MEMORY);
    area_fd = memory_file("fuzz-area", AREA);
    log_fd = memory_file("fuzz-log", AREA);
    huge_fd = memory_file("fuzz-huge", 1ll << 40);
    backend_fd = memory_file("fuzz-backend", CAPACITY);
    sealed_fd = memory_file("fuzz-sealed", 1ll << 40);
    REQUIRE(fcntl(sealed_fd, F_ADD_SEALS, F_SEAL_WRITE) == 0);
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", huge_fd);
    readonly_fd = open(path, O_RDONLY | O_CLOEXEC);
    null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    REQUIRE(readonly_fd >= 0 && null_fd >= 0 && kick_fd >= 0 && call_fd >= 0 && pipe2(pipe_fds, O_CLOEXEC | O_NONBLOCK) == 0);
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    REQUIRE(memory != MAP_FAILED);
    engine = vhc_engine_new(&config, error, sizeof(error));
    if (!engine)
        FINDING("%s", error);
    vhc_backend_facts facts = {.size_bytes = CAPACITY, .align_mem_bytes = 512, .align_io_bytes = 512, .can_flush = 1, .can_zero = 1};
    vhc_backend *backend = vhc_backend_file(engine, backend_fd, &facts, error, sizeof(error));
    if (!backend)
        FINDING("%s", error);
    vhc_volume_config volume = {
        .listen_fd = listen_fd,
        .backend = backend,
        .size_bytes = CAPACITY,
        .cache_fd = -1,
        .tier_fd = -1,
        .slots = SLOTS,
        .object_bytes = 4 << 20,
        .num_queues = QUEUES,
        .write_cache = 1,
        .align_mem_bytes = 1,
        .align_io_bytes = 1,
        .write_depth = 4,
        .discard_max_bytes = 2 << 20,
        .serial = "fuzz",
    };
    if (vhc_volume_add(engine, &volume, error, sizeof(error)) != 0)
        FINDING("%s", error);
    vhc_volume_start(engine, 0);
    struct sigaction action;
    sigaction(SIGBUS, NULL, &action);
    engines_handler = action.sa_sigaction;
    struct sigaction alarm_action; /* libFuzzer's clock must not end a call that hangs */
    sigaction(SIGALRM, NULL, &alarm_action);
    alarm_action.sa_flags |= SA_RESTART;
    sigaction(SIGALRM, &alarm_action, NULL);
    action.sa_sigaction = on_sigbus;
    sigaction(SIGBUS, &action, NULL);
}

static void refresh(void)
{
    char drain[4096];
    REQUIRE(ftruncate(memory_fd, 0) == 0 && ftruncate(memory_fd, MEMORY) == 0);
    REQUIRE(ftruncate(area_fd, 0) == 0 && ftruncate(area_fd, AREA) == 0);
    REQUIRE(ftruncate(log_fd, 0) == 0 && ftruncate(log_fd, AREA) == 0);
    while (read(pipe_fds[0], drain, sizeof(drain)) > 0)
        ;
    memory_bytes = MEMORY;
    memset(avail, 0, sizeof(avail));
    queue_size = 16;
}

static void one_run(void)
{
    refresh();
    connect_again();
    uint8_t choice = take8();
    if (choice & 128)
        handshake(choice);
    for (int i = 0; i < MAX_STEPS && program_left(); i++)
        step();
    leave();
    if (given_area_fd >= 0)
        close(given_area_fd);
    given_area_fd = -1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!engine) {
        set_up();
        program = program_end = NULL;
        one_run();
    }
    /* Mappings are dear to count. Every run of a reproduction is checked, and of long runs some. */
    bool counted = runs++ < 64 || runs % 64 == 0;
    unsigned fds = count_fds(), mappings = counted ? count_mappings() : 0; /* between runs libFuzzer may open files of its own */
    program = data;
    program_end = data + size;
    one_run();
    unsigned fds_now = count_fds(), mappings_now = counted ? count_mappings() : 0;
    if (fds_now != fds)
        FINDING("%u descriptors were open, now %u", fds, fds_now);
    if (mappings_now > mappings)
        FINDING("%u shared mappings were there, now %u", mappings, mappings_now);
    return 0;
}
