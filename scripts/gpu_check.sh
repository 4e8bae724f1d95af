#!/usr/bin/env bash
# Checks the Triton kernels on this machine's GPU, then measures them; within 8 minutes on one H200.
# Writes results/gpu/<gpu>.json and .md. Exit codes: 0, 1 (a result is wrong), 2 (no GPU, nothing installed).
# PYTHON: the interpreter to use; WORKERS: test processes; SECONDS_OF_BENCH: when the last measurement may start.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
WORKERS=${WORKERS:-$(nproc)}
SECONDS_OF_BENCH=${SECONDS_OF_BENCH:-100}
unset TRITON_INTERPRET

"$PYTHON" - <<'CHECK' || exit 2
import sys
try:
    import pytest, torch, triton, xdist  # noqa: F401
    import fp8repro  # noqa: F401
except ImportError as error:
    sys.exit(f"gpu_check: {error}; expected an environment made by `make setup`")
if not torch.cuda.is_available():
    sys.exit("gpu_check: got no CUDA device, expected one")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}", flush=True)
CHECK

# The number of compilations decides the time, so the tests share the cores; the GPU is never the limit here.
timeout 330 "$PYTHON" -m pytest tests/kernels tests/precision/test_graphs.py -m "not long" -n "$WORKERS" -p no:cacheprovider || {
  echo "gpu_check: parity tests failed (or took over 330 s); nothing was measured" >&2
  exit 1
}
exec timeout 130 "$PYTHON" -m fp8repro.bench.kernels --seconds "$SECONDS_OF_BENCH" "$@"
