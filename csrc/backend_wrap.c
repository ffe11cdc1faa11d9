/* What the wrappers share (backend_wrap.h). */
#include "backend_wrap.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAST_ERRNO 133 /* of Linux */

const char *const wrap_kind_names[4] = {[IO_READ] = "read", [IO_WRITE] = "write", [IO_FLUSH] = "flush", [IO_ZERO] = "zero"};

vhc_backend *vhc_backend_wrap(vhc_engine *engine, vhc_backend *below, const char *kind, const char *parameters, char *error, size_t error_bytes)
{
    static const struct wrapper *const wrappers[] = {&wrapper_delay, &wrapper_fault, &wrapper_retry, &wrapper_trace};
    for (size_t i = 0; i < sizeof wrappers / sizeof wrappers[0]; i++) {
        const struct wrapper *wrapper = wrappers[i];
        if (strcmp(kind, wrapper->ops->name) != 0)
            continue;
        void *state = wrapper->make(parameters, error, error_bytes);
        if (!state)
            return NULL;
        struct backend *backend = backend_new(engine, wrapper->ops, below, error, error_bytes);
        if (backend)
            backend->state = state;
        else
            wrapper->destroy(state);
        return backend;
    }
    snprintf(error, error_bytes, "there is no wrapper '%.40s'; there are delay, fault, retry, trace", kind);
    return NULL;
}

/* -- parameters -- */

/* The next word without its backslashes, in memory of its own; NULL: there is none. */
static char *next_word(const char **text)
{
    const char *from = *text;
    while (*from == ' ')
        from++;
    if (!*from)
        return NULL;
    char *word = malloc(strlen(from) + 1), *to = word;
    assert(word);
    for (; *from && *from != ' '; from++) {
        if (*from == '\\' && from[1])
            from++;
        *to++ = *from;
    }
    *to = 0;
    *text = from;
    return word;
}

static bool number(const struct parameter *parameter, const char *value)
{
    char *end;
    errno = 0;
    unsigned long long parsed = strtoull(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || errno || parsed < parameter->least || parsed > parameter->most)
        return false;
    *(uint64_t *)parameter->value = parsed;
    return true;
}

/* Without strtod, which heeds the locale. */
static bool fraction(const struct parameter *parameter, const char *value)
{
    double parsed = 0, unit = 1;
    const char *at = value;
    for (; *at >= '0' && *at <= '9'; at++)
        parsed = parsed * 10 + (*at - '0');
    if (at == value)
        return false;
    if (*at == '.')
        for (at++; *at >= '0' && *at <= '9'; at++)
            parsed += (unit /= 10) * (*at - '0');
    if (*at || parsed > 1)
        return false;
    *(double *)parameter->value = parsed;
    return true;
}

static bool kinds(const struct parameter *parameter, const char *value)
{
    uint32_t set = 0;
    while (*value) {
        size_t length = strcspn(value, ",");
        uint32_t bit = 0;
        for (unsigned kind = 0; kind < 4; kind++)
            if (strlen(wrap_kind_names[kind]) == length && !strncmp(value, wrap_kind_names[kind], length))
                bit = KIND_BIT(kind);
        if (!bit)
            return false;
        set |= bit;
        value += length;
        if (*value == ',' && !*++value)
            return false;
    }
    *(uint32_t *)parameter->value = set;
    return set != 0;
}

static bool errno_by_name(const struct parameter *parameter, const char *value)
{
    for (int32_t candidate = 1; candidate <= LAST_ERRNO; candidate++) {
        const char *name = strerrorname_np(candidate);
        if (name && !strcmp(name, value)) {
            *(int32_t *)parameter->value = candidate;
            return true;
        }
    }
    return false;
}

static bool set_parameter(const struct parameter *parameter, const char *value)
{
    switch (parameter->type) {
    case PARAMETER_NUMBER:
        return number(parameter, value);
    case PARAMETER_FRACTION:
        return fraction(parameter, value);
    case PARAMETER_KINDS:
        return kinds(parameter, value);
    case PARAMETER_ERRNO:
        return errno_by_name(parameter, value);
    case PARAMETER_TEXT:
        return *value && (*(char **)parameter->value = strdup(value));
    }
    return false;
}

static void say_what_is_allowed(const struct parameter *parameter, const char *word, const char *wrapper, char *error, size_t error_bytes)
{
    int said = snprintf(error, error_bytes, "%s: '%.80s': allowed: ", wrapper, word);
    if (said < 0 || (size_t)said >= error_bytes)
        return;
    error += said;
    error_bytes -= (size_t)said;
    switch (parameter->type) {
    case PARAMETER_NUMBER:
        snprintf(error, error_bytes, "a whole number from %llu to %llu", (unsigned long long)parameter->least, (unsigned long long)parameter->most);
        break;
    case PARAMETER_FRACTION:
        snprintf(error, error_bytes, "a number from 0 to 1, such as 0.01");
        break;
    case PARAMETER_KINDS:
        snprintf(error, error_bytes, "read, write, flush, zero, or several of them with commas between");
        break;
    case PARAMETER_ERRNO:
        snprintf(error, error_bytes, "the name of an error, such as EIO or ENOSPC");
        break;
    case PARAMETER_TEXT:
        snprintf(error, error_bytes, "a path");
        break;
    }
}

static void say_what_there_is(const struct parameter *parameters, uint32_t count, const char *word, const char *wrapper, char *error,
                              size_t error_bytes)
{
    size_t said = (size_t)snprintf(error, error_bytes, "%s: '%.80s' is not a parameter; there are ", wrapper, word);
    for (uint32_t i = 0; i < count && said < error_bytes; i++)
        said += (size_t)snprintf(error + said, error_bytes - said, "%s%s", i ? ", " : "", parameters[i].name);
}

/* One word of them. `seen` has a bit for each that has come. */
static bool one_parameter(const char *wrapper, char *word, const struct parameter *parameters, uint32_t count, uint32_t *seen, char *error,
                          size_t error_bytes)
{
    size_t length = strcspn(word, "=");
    for (uint32_t i = 0; i < count; i++) {
        const struct parameter *parameter = &parameters[i];
        if (!word[length] || strlen(parameter->name) != length || strncmp(word, parameter->name, length) != 0)
            continue;
        if (*seen & 1u << i) {
            snprintf(error, error_bytes, "%s: '%s' comes twice", wrapper, parameter->name);
            return false;
        }
        *seen |= 1u << i;
        if (set_parameter(parameter, word + length + 1))
            return true;
        say_what_is_allowed(parameter, word, wrapper, error, error_bytes);
        return false;
    }
    say_what_there_is(parameters, count, word, wrapper, error, error_bytes);
    return false;
}

bool wrap_parameters(const char *wrapper, const char *text, const struct parameter *parameters, uint32_t count, char *error, size_t error_bytes)
{
    uint32_t seen = 0;
    bool sound = true;
    char *word;
    assert(count <= 32);
    while (sound && (word = next_word(&text))) {
        sound = one_parameter(wrapper, word, parameters, count, &seen, error, error_bytes);
        free(word);
    }
    return sound;
}

void wrap_give_up(struct backend *backend)
{
    backend->given_up = true;
    backend_wake_at(backend, 0);
}

bool wrap_abandon(struct backend *backend, struct io *io)
{
    assert(io->at == backend);
    return true;
}

/* -- random numbers: splitmix64 -- */

uint64_t wrap_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

uint64_t wrap_random_below(uint64_t *state, uint64_t below)
{
    return below ? wrap_random(state) % below : 0;
}

/* -- I/O that waits -- */

static bool before(const struct waiting *a, const struct waiting *b)
{
    return a->due_ns != b->due_ns ? a->due_ns < b->due_ns : a->order < b->order;
}

void timers_add(struct timers *timers, uint64_t due_ns, struct io *io, int32_t result)
{
    if (timers->count == timers->size)
        timers->items = engine_grow(timers->items, &timers->size, sizeof *timers->items);
    struct waiting *items = timers->items, added = {due_ns, timers->order++, io, result};
    uint32_t at = timers->count++;
    while (at && before(&added, &items[(at - 1) / 2])) {
        items[at] = items[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    items[at] = added;
}

bool timers_take(struct timers *timers, uint64_t now_ns, struct waiting *first)
{
    if (timers_next(timers) > now_ns || !timers->count)
        return false;
    struct waiting *items = timers->items, last = items[--timers->count];
    uint32_t at = 0, child;
    *first = items[0];
    while ((child = 2 * at + 1) < timers->count) {
        if (child + 1 < timers->count && before(&items[child + 1], &items[child]))
            child++;
        if (!before(&items[child], &last))
            break;
        items[at] = items[child];
        at = child;
    }
    items[at] = last;
    return true;
}
