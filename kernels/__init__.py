"""Triton kernels of the recipe; must not be imported where Triton is missing."""
