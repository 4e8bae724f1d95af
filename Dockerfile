# fp8repro on a machine with an NVIDIA GPU (docker run --gpus all); torch brings CUDA's libraries, Triton its compiler.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# A C++ compiler for the CPU engines and for Triton's launchers, which also need Python's headers.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /fp8repro
COPY . .
RUN make setup
ENV PATH=/fp8repro/.venv/bin:$PATH
CMD ["fp8repro", "doctor"]
