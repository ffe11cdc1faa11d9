/* The engine's public interface: engine.cdef, which cffi reads too. */
#ifndef VHC_ENGINE_H
#define VHC_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#include "engine.cdef"

#endif
