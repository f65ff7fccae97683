"""The contract of StreamIndex Service: generated stubs in `v1`, and how tensors are framed on the wire."""
