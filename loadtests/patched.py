"""Imported before anything else of a locust process: sockets and threads by gevent, and gRPC that waits with them.

Without `init_gevent` a blocking call holds up every user of the process; it must come before the first channel.
"""

import locust  # noqa: F401  its import patches the standard library, which must come first
from grpc.experimental import gevent as grpc_gevent

grpc_gevent.init_gevent()
