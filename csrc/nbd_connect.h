/* Connecting to an NBD server: resolving, connecting, TLS, negotiation, all of which may wait. */
#ifndef VHC_NBD_CONNECT_H
#define VHC_NBD_CONNECT_H

#include <libnbd.h>

#include "internal.h"

/* Where and how. Shared by the attempts, and freed by whoever lets go of it last. */
struct nbd_target;
/* One attempt. */
struct nbd_attempt;

/* NULL with one line in `error`. */
struct nbd_target *nbd_target_new(const vhc_nbd_config *config, char *error, size_t error_bytes);
void nbd_target_release(struct nbd_target *target);

/* In a thread of its own; the descriptor becomes readable when it is over. NULL: no thread could be had. */
struct nbd_attempt *nbd_attempt_start(struct nbd_target *target);
int nbd_attempt_fd(const struct nbd_attempt *attempt);
/* End it, if it has taken too long. When to look again. */
uint64_t nbd_attempt_look(struct nbd_attempt *attempt, uint64_t now_ns);
/* It is over: the connection and what the export is, or NULL with one line in `error`; *refused: because of what the export is. Ends the
 * attempt. */
struct nbd_handle *nbd_attempt_finish(struct nbd_attempt *attempt, vhc_backend_facts *facts, bool *refused, char *error, size_t error_bytes);
/* Nobody wants it any more. */
void nbd_attempt_abandon(struct nbd_attempt *attempt);

/* Here and now. */
struct nbd_handle *nbd_connect_now(struct nbd_target *target, vhc_backend_facts *facts, char *error, size_t error_bytes);

#endif
