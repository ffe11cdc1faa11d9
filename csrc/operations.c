/* The core's operations, one after the other. The core is trusted, and every one of its mistakes is found by an assertion. */
#include <string.h>

#include "io.h"

struct stream {
    const uint64_t *next, *end;
};

static const uint64_t *take(struct stream *stream, uint32_t words)
{
    const uint64_t *first = stream->next;
    assert(words <= stream->end - stream->next);
    stream->next += words;
    return first;
}

static struct volume *volume_by_number(vhc_engine *engine, uint32_t number)
{
    assert(number < engine->volumes_count);
    return engine->volumes[number];
}

static uint8_t *checked_slot(const struct volume *volume, uint64_t slot, uint32_t lowest)
{
    assert(slot >= lowest && slot < volume->config.slots);
    return slab_slot(volume, (uint32_t)slot);
}

static void copy_slots(vhc_engine *engine, struct stream *stream, uint32_t tag, uint32_t count, bool in)
{
    struct request *request = request_by_tag(engine, tag);
    struct volume *volume = request->connection->volume;
    const uint64_t *words = take(stream, 2);
    const uint64_t *slots = take(stream, count);
    uint32_t offset = (uint32_t)words[0], left = (uint32_t)(words[0] >> 32), skip = (uint32_t)words[1];
    assert(skip < VHC_BLOCK && left && (uint64_t)skip + left <= (uint64_t)count * VHC_BLOCK);
    for (uint32_t i = 0; left; i++) {
        uint32_t part = VHC_BLOCK - skip < left ? VHC_BLOCK - skip : left;
        uint8_t *slot = checked_slot(volume, slots[i], in ? VHC_FIRST_SLOT : 1) + skip;
        if (in)
            request_copy_in(request, offset, part, slot);
        else
            request_copy_out(request, offset, part, slot);
        offset += part;
        left -= part;
        skip = 0;
    }
}

static void backend_operation(vhc_engine *engine, struct stream *stream, uint32_t opcode, uint32_t number, uint32_t arg)
{
    struct volume *volume = volume_by_number(engine, number);
    if (opcode == VHC_OP_FLUSH) {
        io_flush(volume, IO_BACKEND, (uint32_t)take(stream, 1)[0]);
        return;
    }
    const uint64_t *words = take(stream, 3);
    assert(words[1] <= volume->size_bytes && words[2] <= volume->size_bytes - words[1]);
    if (opcode == VHC_OP_ZERO)
        io_zero(volume, (uint32_t)words[0], words[1], words[2], arg & 1);
    else
        io_slots(volume, IO_BACKEND, opcode == VHC_OP_READ ? IO_READ : IO_WRITE, (uint32_t)words[0], words[1], words[2], take(stream, arg), arg,
                 (uint32_t)(words[0] >> 32));
}

static void slot_operation(vhc_engine *engine, struct stream *stream, uint32_t opcode, uint32_t number, uint32_t slot)
{
    struct volume *volume = volume_by_number(engine, number);
    uint64_t word = take(stream, 1)[0];
    if (opcode == VHC_OP_SLOT_COPY) {
        memcpy(checked_slot(volume, word, VHC_FIRST_SLOT), checked_slot(volume, slot, 1), VHC_BLOCK);
    } else {
        uint32_t offset = (uint32_t)word, bytes = (uint32_t)(word >> 32);
        assert(offset <= VHC_BLOCK && bytes <= VHC_BLOCK - offset);
        memset(checked_slot(volume, slot, VHC_FIRST_SLOT) + offset, 0, bytes);
    }
}

static void one_block(vhc_engine *engine, uint32_t tag, uint32_t slot, bool in)
{
    struct request *request = request_by_tag(engine, tag);
    uint8_t *memory = checked_slot(request->connection->volume, slot, in ? VHC_FIRST_SLOT : 1);
    assert(request->payload_bytes == VHC_BLOCK);
    if (in)
        request_copy_in(request, 0, VHC_BLOCK, memory);
    else
        request_copy_out(request, 0, VHC_BLOCK, memory);
    request_complete(request, VBLK_OK);
}

static void log_one_block(vhc_engine *engine, uint32_t tag, uint32_t slot)
{
    struct request *request = request_by_tag(engine, tag);
    struct volume *volume = request->connection->volume;
    assert(request->payload_bytes == VHC_BLOCK && request->sector % (VHC_BLOCK / VBLK_SECTOR) == 0);
    request_copy_in(request, 0, VHC_BLOCK, checked_slot(volume, slot, VHC_FIRST_SLOT));
    tier_publish_one(volume, request->sector / (VHC_BLOCK / VBLK_SECTOR), slot);
    request_complete(request, VBLK_OK);
}

static void tier_operation(vhc_engine *engine, struct stream *stream, uint32_t opcode, uint32_t number, uint32_t arg)
{
    struct volume *volume = volume_by_number(engine, number);
    uint64_t word = take(stream, 1)[0];
    if (opcode == VHC_OP_PUBLISH)
        tier_publish(volume, word, take(stream, 2 * arg), arg);
    else if (opcode == VHC_OP_RETIRE)
        tier_retire(volume, word);
    else
        volume->tier.seq = word;
}

static void write_record(struct volume *volume, struct stream *stream, uint32_t payload_blocks)
{
    const uint64_t *given = take(stream, 4);
    uint64_t slots[LOG_MAX_SLOTS];
    struct log_record record = {.offset = given[1], .slots = slots, .payload_blocks = payload_blocks, .words_count = (uint32_t)given[3]};
    record.words = take(stream, record.words_count);
    slots[record.header_blocks++] = (uint32_t)given[2];
    if (given[2] >> 32)
        slots[record.header_blocks++] = given[2] >> 32;
    assert(payload_blocks <= LOG_MAX_SLOTS - record.header_blocks);
    memcpy(slots + record.header_blocks, take(stream, payload_blocks), payload_blocks * sizeof slots[0]);
    assert(given[0] >> 34 == 0);
    log_write(volume, (uint32_t)given[0], &record, given[0] >> 32 & 1, given[0] >> 33 & 1);
}

static void log_operation(vhc_engine *engine, struct stream *stream, uint32_t opcode, uint32_t number, uint32_t arg)
{
    struct volume *volume = volume_by_number(engine, number);
    if (opcode == VHC_OP_LOG_WRITE) {
        write_record(volume, stream, arg);
    } else if (opcode == VHC_OP_LOG_FLUSH) {
        io_flush(volume, IO_CACHE, (uint32_t)take(stream, 1)[0]);
    } else {
        const uint64_t *given = take(stream, 2);
        const uint64_t *rest = take(stream, arg);
        if (opcode == VHC_OP_LOG_READ)
            log_read(volume, (uint32_t)given[0], given[1], rest, arg);
        else if (opcode == VHC_OP_STORE)
            log_store(volume, (uint32_t)given[0], given[1], rest, arg);
        else
            log_superblock(volume, (uint32_t)given[0], given[1], rest, arg);
    }
}

void operations_run(vhc_engine *engine, const uint64_t *operations, uint32_t words)
{
    struct stream stream = {operations, operations + words};
    while (stream.next < stream.end) {
        uint64_t word = *stream.next++;
        uint32_t opcode = word & 255, number = word >> 8 & 0xffffff, arg = (uint32_t)(word >> 32);
        switch (opcode) {
        case VHC_OP_IN1:
        case VHC_OP_OUT1:
            one_block(engine, number, arg, opcode == VHC_OP_IN1);
            break;
        case VHC_OP_IN:
        case VHC_OP_OUT:
            copy_slots(engine, &stream, number, arg, opcode == VHC_OP_IN);
            break;
        case VHC_OP_COMPLETE:
            assert(arg <= VBLK_UNSUPP);
            request_complete(request_by_tag(engine, number), (uint8_t)arg);
            break;
        case VHC_OP_DROP:
            request_drop(request_by_tag(engine, number));
            break;
        case VHC_OP_SLOT_COPY:
        case VHC_OP_SLOT_ZERO:
            slot_operation(engine, &stream, opcode, number, arg);
            break;
        case VHC_OP_READ_DIRECT:
        case VHC_OP_WRITE_DIRECT: {
            const uint64_t *given = take(&stream, 3);
            struct request *request = request_by_tag(engine, number);
            uint64_t size = request->connection->volume->size_bytes;
            assert(given[1] <= size && given[2] <= size - given[1]);
            io_direct(request, IO_BACKEND, opcode == VHC_OP_READ_DIRECT ? IO_READ : IO_WRITE, arg ? IO_NO_GROUP : (uint32_t)given[0],
                      (uint32_t)(given[0] >> 32), given[1], given[2]);
            break;
        }
        case VHC_OP_READ:
        case VHC_OP_WRITE:
        case VHC_OP_FLUSH:
        case VHC_OP_ZERO:
            backend_operation(engine, &stream, opcode, number, arg);
            break;
        case VHC_OP_LOG1:
            log_one_block(engine, number, arg);
            break;
        case VHC_OP_PUBLISH:
        case VHC_OP_RETIRE:
        case VHC_OP_LOG_SEQ:
            tier_operation(engine, &stream, opcode, number, arg);
            break;
        case VHC_OP_LOG_READ_DIRECT: {
            const uint64_t *given = take(&stream, 3);
            log_read_direct(request_by_tag(engine, number), arg ? IO_NO_GROUP : (uint32_t)given[0], (uint32_t)(given[0] >> 32), given[1], given[2]);
            break;
        }
        case VHC_OP_LOG_READ:
        case VHC_OP_LOG_WRITE:
        case VHC_OP_LOG_FLUSH:
        case VHC_OP_STORE:
        case VHC_OP_SUPERBLOCK:
            log_operation(engine, &stream, opcode, number, arg);
            break;
        default:
            assert(!"an operation that does not exist");
        }
    }
}
