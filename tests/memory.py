"""How a test measures what a process holds, and not what its allocator keeps for later."""

import os

EXACT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
"""The environment of a process to measure. In glibc's own, blocks that were freed may stay
resident in a heap that others pin, by how threads happened to run; with it, whatever is of 64 KB
or more goes back to the system as it is freed. Other C libraries take no notice."""
