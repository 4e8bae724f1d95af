"""Hydra configuration groups; installs as `fp8repro.conf`."""
