"""Benchmarks: one module a table of figures, all with the options `--out FILE` and `--quick`.

`python -m benchmarks --out DIR` runs those that this machine can run; `python -m benchmarks.render DIR` makes tables
and pictures of what they wrote. A module exits with an error, and writes no figures, when an answer was wrong. The form
of a result file is in `benchmarks.harness`.
"""
