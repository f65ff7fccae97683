"""Load tests: users of the service under locust, a runner that watches the service meanwhile, reports and a sweep.

python -m loadtests run --profile cpu --out DIR        one profile, and its report
python -m loadtests sweep --profile cpu --out DIR      offered load against latency and refusals
python -m loadtests report DIR                         the report of a run once more
"""
