"""Where a volume's data ends up. One contract (base), one module for each kind."""
