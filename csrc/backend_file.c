/* The backend that is a file or a block device: I/O by the engine's driver, which io.c continues when it is cut short. */
#include <stdlib.h>
#include <stdio.h>

#include "io.h"

static void file_submit(struct backend *backend, struct io *io)
{
    io->file = backend->state;
    io->way = io->may_unmap ? ZERO_PUNCH : ZERO_RANGE;
    io->retries = 0;
    io_start(backend->engine, io);
}

static void file_close(struct backend *backend)
{
    if (backend->engine->driver_state)
        backend->engine->driver->remove_file(backend->engine, backend->state);
    free(backend->state);
}

static const struct backend_ops file_ops = {.name = "file", .submit = file_submit, .close = file_close};

vhc_backend *vhc_backend_file(vhc_engine *engine, int fd, const vhc_backend_facts *facts, char *error, size_t error_bytes)
{
    struct io_file *file = malloc(sizeof *file);
    if (!backend_facts_sound(facts, error, error_bytes) || !file) {
        free(file);
        return NULL;
    }
    *file = (struct io_file){fd, -1};
    struct backend *backend = backend_new(engine, &file_ops, NULL, error, error_bytes);
    if (!backend) {
        free(file);
        return NULL;
    }
    backend->facts = *facts;
    backend->state = file;
    engine->driver->add_file(engine, file);
    return backend;
}
