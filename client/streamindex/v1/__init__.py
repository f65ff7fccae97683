"""Stubs generated from `proto/streamindex/v1` by `make stubs`."""
