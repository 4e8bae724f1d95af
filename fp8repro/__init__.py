"""Reproduction of *Mixed Precision Training With 8-bit Floating Point* (arXiv 1905.12334)."""

__version__ = "0.1.0"
