"""Measurements of a host that an operator makes: `streamindex bench`."""
