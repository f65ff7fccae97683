"""Searches with a part of the algorithm left out, for the ablations: no product code, and used by none."""
