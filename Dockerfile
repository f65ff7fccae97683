# syntax=docker/dockerfile:1
# The service on a GPU or a CPU, and beside it (target `load`) the load tests.
#
#     docker build -t streamindex .
#     docker build -t streamindex-cpu --build-arg BASE=ubuntu:24.04 \
#         --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# torch's wheels bring the CUDA libraries that they were built with; the base image gives the container the driver.
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${BASE} AS python
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Triton compiles a launcher for each kernel when it is first used: that needs a C compiler and Python's headers here.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/streamindex/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

FROM python AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/streamindex
WORKDIR /src
ARG TORCH_INDEX=
# torch alone first: it is large, and changes less often than the rest
COPY constraints.txt ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY streamindex_service streamindex_service
RUN pip install --no-cache-dir --constraint constraints.txt './client[fast]' '.[otel]'

FROM build AS build-load
RUN pip install --no-cache-dir --constraint constraints.txt '.[load,bench]'

FROM python AS base
# Fixed numbers: the unix socket is its owner's alone, so clients in other containers run as the same user.
RUN groupadd --gid 10001 streamindex \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/streamindex streamindex \
    && install --directory --owner=10001 --group=10001 --mode=0700 /run/streamindex /var/cache/streamindex
# Nothing else is written, so the root file system may be read-only. Triton loads what it compiles from its cache:
# what is mounted there must allow execution.
ENV HOME=/var/cache/streamindex TRITON_CACHE_DIR=/var/cache/streamindex/triton
USER 10001:10001
WORKDIR /var/cache/streamindex

FROM base AS load
COPY --from=build-load /opt/streamindex /opt/streamindex
COPY loadtests /opt/streamindex/load/loadtests
ENV PYTHONPATH=/opt/streamindex/load
ENTRYPOINT ["locust", "--locustfile", "/opt/streamindex/load/loadtests/locustfile.py"]

FROM base AS service
COPY --from=build /opt/streamindex /opt/streamindex
# One arena: with one for each thread glibc keeps memory that no limit of the service knows of.
ENV STREAMINDEX_SERVER__UNIX_SOCKET=/run/streamindex/streamindex.sock MALLOC_ARENA_MAX=1
# The first search compiles kernels, and a worker may take worker.ready_timeout_s (180 s) to be ready.
HEALTHCHECK --interval=15s --timeout=10s --start-period=180s --retries=3 CMD ["streamindex", "health"]
ENTRYPOINT ["streamindex"]
CMD ["serve"]
