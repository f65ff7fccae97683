"""The device process: it owns the GPU (or the CPU's cores), keeps pages of keys there, and computes tiles."""
