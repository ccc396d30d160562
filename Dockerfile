# One image for every role of a deployment; docker-compose.yml says which is which.
#
#   docker build -t fedcil:dev .                                     on a machine with a registry and a package index
#   docker build -t fedcil:dev --build-arg BASE_IMAGE=mybase:py311 \
#     --build-arg PIP_ARGS=--no-index .                              without both: wheels in deploy/wheelhouse/
#
# Packages that torch needs for CUDA make an image of several GB. A CPU image: give the index of torch's CPU wheels,
# --build-arg PIP_ARGS="--extra-index-url <index>", or put those wheels into deploy/wheelhouse/.
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

# nginx is the gate between nodes and the SuperLink (deploy/gate.conf); a base image may bring it.
RUN command -v nginx >/dev/null \
 || { apt-get update -q && apt-get install -y -q --no-install-recommends nginx-light && rm -rf /var/lib/apt/lists/*; }

# What is mounted over these folders takes their owner from here.
RUN useradd --uid 10001 --create-home --home-dir /app app \
 && python3 -m venv /opt/venv \
 && install -d -o 10001 -g 10001 -m 0750 \
      /pki /pki/authority /pki/public /pki/server /pki/nodes /state /runs /nodes
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 LANG=C.UTF-8 OMP_NUM_THREADS=1

# Bytecode is kept: Flower starts a process for every message, which would compile all its imports again.
ARG PIP_ARGS=""
COPY deploy/requirements.txt /tmp/requirements.txt
RUN --mount=type=bind,source=deploy/wheelhouse,target=/wheelhouse \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    pip install --no-cache-dir ${PIP_ARGS} --find-links /wheelhouse -r /tmp/requirements.txt

COPY deploy/gate.conf /etc/fedcil/gate.conf
COPY pyproject.toml README.md LICENSE /src/
COPY fedcil /src/fedcil
COPY server /src/server
COPY client /src/client
COPY scenarios /src/scenarios
RUN pip install --no-cache-dir --no-deps --no-index --no-build-isolation /src

USER 10001:10001
WORKDIR /app
