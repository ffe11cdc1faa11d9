"""The cffi module of csrc/loadgen (see loadgen.cdef): made by the build, imported by loadgen.py only."""

from typing import Any

ffi: Any
lib: Any
