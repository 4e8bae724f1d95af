"""Lets Triton's own just-in-time path compile what a run on a GPU launches, or only make the keys; no GPU takes part.

    env -u TRITON_INTERPRET python tests/training/just_in_time.py WORK hits|keys

WORK is a pickled `Work`. Prints of each kernel as JSON: its name, and whether Triton's cache had it; or its name, the
key of what another process would compile, and the key of the just-in-time path.
"""

import json
import pickle
import sys
from pathlib import Path

import triton
import triton.compiler
from triton.compiler.compiler import get_cache_invalidating_env_vars, make_backend
from triton.runtime.cache import get_cache_key

from fp8repro.kernels.listing import Gpu, pretend
from fp8repro.training.warm_steps import take_steps


def hits(work):
    found, compiler = [], triton.compiler.compile
    triton.knobs.compilation.listener = lambda src, cache_hit, **_: found.append((src.name, cache_hit))
    pretend(Gpu(work.capability, work.processors), lambda kernel: None)
    triton.compiler.compile = compiler
    take_steps(work)
    return found


def keys(work):
    kernels, found = [], []
    pretend(Gpu(work.capability, work.processors), kernels.append)
    record = triton.compiler.compile

    def compile(source, target, options):
        record(source, target, options)
        backend = make_backend(target)
        # As `triton.compile` makes it.
        key = get_cache_key(source, backend, backend.parse_options(dict(options)), get_cache_invalidating_env_vars())
        found.append((source.name, pickle.loads(pickle.dumps(kernels.pop())).cache_key(), key))
        return object()

    triton.compiler.compile = compile
    take_steps(work)
    return found


if __name__ == "__main__":
    print(json.dumps({"hits": hits, "keys": keys}[sys.argv[2]](pickle.loads(Path(sys.argv[1]).read_bytes()))))
