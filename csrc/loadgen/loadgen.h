/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef VHOSTCACHE_LOADGEN_H
#define VHOSTCACHE_LOADGEN_H

#include <stddef.h>
#include <stdint.h>

#include "loadgen.cdef"

#endif
