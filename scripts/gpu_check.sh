#!/usr/bin/env bash
# Checks and measures this machine's GPU: scripts/gpu_check.sh PART OUT [--data FOLDER] [--budget SECONDS] [--rehearse].
# PYTHON: the interpreter to use.
cd "$(dirname "$0")/.." && export GPU_CHECK_FROM=$OLDPWD
exec "${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}" scripts/gpu/check.py "$@"
