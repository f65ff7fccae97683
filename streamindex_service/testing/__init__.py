"""Tools for tests of the service and of what is built on it."""
