/* What has to be on the medium: a thread for each cache file that writes records and syncs them. */
#ifndef VHC_SYNCER_H
#define VHC_SYNCER_H

#include "io.h"

/* NULL with one line in `error`. */
struct syncer *syncer_create(vhc_engine *engine, int fd, char *error, size_t error_bytes);
/* None of its I/O is in flight. */
void syncer_destroy(struct syncer *syncer);
/* A durable write, or a flush. */
void syncer_submit(struct syncer *syncer, struct io *io);

bool syncs_create(vhc_engine *engine, char *error, size_t error_bytes);
void syncs_destroy(vhc_engine *engine);
/* Call io_ended() for what has ended. Returns how many. */
uint32_t syncs_reap(vhc_engine *engine);
/* Block until something has ended; there is something in flight. */
void syncs_wait(vhc_engine *engine);

#endif
