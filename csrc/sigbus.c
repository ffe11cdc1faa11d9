/* Mappings of other people's files, and what happens when such a file is truncated beneath us.
 *
 * The one thing in the engine that is global, because a signal handler is. A fault inside a registered mapping replaces the whole
 * mapping by zeroes and sets its owner's flag; the owner then disconnects that front-end. Everything else that raises SIGBUS is a
 * fault of ours and gets the action that was there before. The whole mapping, not only the page: the pages of hugetlbfs cannot be
 * replaced one by one, and one fault is enough to condemn the front-end. */
#include "internal.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>

#define MAPPINGS 8192

static struct mapping {
    _Atomic uintptr_t start; /* 0: free */
    uintptr_t end;
    volatile int *flag;
} mappings[MAPPINGS];
static atomic_uint mappings_used; /* the highest that was ever in use, plus one */
static pthread_mutex_t mappings_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction previous;
static bool installed;

static void handle(int number, siginfo_t *info, void *context)
{
    (void)context;
    uintptr_t address = (uintptr_t)info->si_addr;
    unsigned used = atomic_load(&mappings_used);
    for (unsigned i = 0; info->si_code > 0 && i < used; i++) {
        uintptr_t start = atomic_load_explicit(&mappings[i].start, memory_order_acquire);
        if (start && address >= start && address < mappings[i].end) {
            void *zeroes = mmap((void *)start, mappings[i].end - start, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
            if (zeroes != MAP_FAILED) {
                *mappings[i].flag = 1;
                return;
            }
        }
    }
    sigaction(number, &previous, NULL); /* and the instruction faults again */
    if (info->si_code <= 0)
        raise(number);
}

bool sigbus_install(void)
{
    pthread_mutex_lock(&mappings_mutex);
    if (!installed) {
        struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
        sigemptyset(&action.sa_mask);
        installed = sigaction(SIGBUS, &action, &previous) == 0;
    }
    pthread_mutex_unlock(&mappings_mutex);
    return installed;
}

bool sigbus_watch(const void *start, size_t bytes, volatile int *flag)
{
    bool found = false;
    pthread_mutex_lock(&mappings_mutex);
    for (unsigned i = 0; i < MAPPINGS && !found; i++) {
        if (atomic_load_explicit(&mappings[i].start, memory_order_relaxed))
            continue;
        mappings[i].end = (uintptr_t)start + bytes;
        mappings[i].flag = flag;
        atomic_store_explicit(&mappings[i].start, (uintptr_t)start, memory_order_release);
        if (i >= atomic_load(&mappings_used))
            atomic_store(&mappings_used, i + 1);
        found = true;
    }
    pthread_mutex_unlock(&mappings_mutex);
    return found;
}

void sigbus_forget(const void *start)
{
    pthread_mutex_lock(&mappings_mutex);
    for (unsigned i = 0; i < MAPPINGS; i++) {
        if (atomic_load_explicit(&mappings[i].start, memory_order_relaxed) == (uintptr_t)start) {
            atomic_store_explicit(&mappings[i].start, 0, memory_order_release);
            break;
        }
    }
    pthread_mutex_unlock(&mappings_mutex);
}
