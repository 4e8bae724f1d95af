"""Benchmarks: what the machine can do, and what this code reaches of it, measured in the same run."""

# What tables say of a bar.
REACHED = {True: "yes", False: "no", None: ""}
