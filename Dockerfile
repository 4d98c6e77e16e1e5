# The image that docs/kubernetes names: the project and its pinned packages, on CPUs and GPUs alike (the pinned torch
# brings its CUDA along). One stage: all packages are wheels, so there is no compiler to leave behind. They go into the
# image's own Python, as Ray would copy a whole virtual environment for each job that pins its packages.
FROM python:3.11-slim-bookworm

# KubeRay's probes call wget.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/multitask
COPY pyproject.toml constraints.txt README.md LICENSE ./
# The packages alone, without the project: this layer, nearly all of the image, stays as it is while the code changes.
RUN mkdir patches multitask jobs && pip install --no-cache-dir --constraint constraints.txt .

COPY patches patches
COPY multitask multitask
COPY jobs jobs
RUN pip install --no-cache-dir --no-deps --force-reinstall .

RUN useradd --create-home --uid 1000 ray
USER ray
WORKDIR /home/ray
# Objects that are freed give their memory back at once, as in cluster.yaml.
ENV RAY_AUTH_MODE=token RAY_free_objects_batch_size=1
