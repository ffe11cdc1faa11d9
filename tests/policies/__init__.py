"""Hit rates of eviction policies on traces that are generated here: `make policies`."""
