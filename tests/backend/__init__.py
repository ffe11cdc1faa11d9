"""One contract for every backend and wrapper, and what becomes of it when a server fails or lies."""
