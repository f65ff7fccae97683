"""The demo: starts the service, loads a data set, searches it, and checks the answers. May import torch."""

from streamindex_service.demo.options import DemoError, DemoOptions
from streamindex_service.demo.run import run

__all__ = ["DemoError", "DemoOptions", "run"]
