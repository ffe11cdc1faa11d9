/* Which parts of an export hold nothing but zeroes, as the server has said: they are read without asking it again. */
#ifndef VHC_NBD_HOLES_H
#define VHC_NBD_HOLES_H

#include <stdbool.h>
#include <stdint.h>

struct holes;

/* A question to the server: what is in this range. */
struct question {
    uint64_t offset;
    uint32_t bytes;
    uint64_t asked_at; /* what was changed later is not believed */
};

/* NULL: no memory, and then there is nothing to know. */
struct holes *holes_new(uint64_t size_bytes);
void holes_free(struct holes *holes);
/* Nothing is known any more. */
void holes_forget(struct holes *holes);
/* All of it is known to be zeroes. */
bool holes_cover(const struct holes *holes, uint64_t offset, uint64_t bytes);
/* Something is written or zeroed there, and that has ended, well or not. */
void holes_change_begins(struct holes *holes, uint64_t offset, uint64_t bytes);
void holes_change_ends(struct holes *holes, uint64_t offset, uint64_t bytes);
/* Is it worth asking, now that this is read? Any number of answers follow, then holes_answered(). */
bool holes_ask(struct holes *holes, uint64_t offset, uint64_t bytes, struct question *question);
/* `bytes` from `offset` on are zeroes or not, says the server of a part of what it was asked, or of what follows that. */
void holes_answer(struct holes *holes, const struct question *question, uint64_t offset, uint64_t bytes, bool zeroes);
void holes_answered(struct holes *holes, const struct question *question, bool good);
/* The server does not answer this one. False: nor would it a shorter one. */
bool holes_ask_less(struct holes *holes, const struct question *question);

#endif
