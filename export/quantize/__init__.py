"""Quantization of what does not train."""
