"""The decisions of the service: pure Python, no I/O, the clock injected, so that all of it can be simulated."""
