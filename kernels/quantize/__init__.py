"""The quantizer."""
