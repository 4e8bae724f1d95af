"""The optimizer's step over master weights."""
