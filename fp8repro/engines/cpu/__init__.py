"""The C++ engine: roundings, BF16 products and updates on a CPU, compiled at first use."""
