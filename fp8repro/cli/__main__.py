"""`python -m fp8repro.cli`, which is what `torchrun -m` and machines without the installed command call."""

from fp8repro.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
