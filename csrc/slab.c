/* The slab of a volume: its slots, in one piece of shared memory that is there from the start: the process's own, or the part of the
 * RAM-tier file that holds the slots and outlives the process. Every page is allocated before the first request, so that a machine short
 * of memory refuses to start instead of killing a running daemon. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

bool slab_create(struct volume *volume, char *error, size_t error_bytes)
{
    size_t bytes = (size_t)volume->config.slots * VHC_BLOCK;
    int fd = volume->config.tier_fd, problem = 0;
    off_t start = fd >= 0 ? (off_t)volume->config.tier_slab_offset : 0;
    volume->slab = NULL;
    if (fd < 0) {
        fd = volume->slab_fd = memfd_create("vhostcache-slab", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        problem = fd < 0 || ftruncate(fd, (off_t)bytes) < 0 ? errno : 0;
    }
    if (!problem)
        problem = posix_fallocate(fd, start, (off_t)bytes);
    if (!problem) {
        void *slab = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, start);
        if (slab == MAP_FAILED)
            problem = errno;
        else
            volume->slab = slab;
    }
    if (problem) {
        snprintf(error, error_bytes, "cannot allocate %zu MiB of memory: %s", bytes >> 20, strerror(problem));
        slab_destroy(volume);
        return false;
    }
    madvise(volume->slab, bytes, MADV_HUGEPAGE);
    madvise(volume->slab, bytes, MADV_DONTDUMP);
    return true;
}

void slab_destroy(struct volume *volume)
{
    if (volume->slab)
        munmap(volume->slab, (size_t)volume->config.slots * VHC_BLOCK);
    if (volume->slab_fd >= 0)
        close(volume->slab_fd);
    volume->slab = NULL;
    volume->slab_fd = -1;
}
