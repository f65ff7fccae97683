"""The gRPC server: it owns every acknowledged key, decides who runs, and never imports torch."""
