"""Stubs generated from `proto/streamindex_service/ipc/v1` by `make stubs`."""
