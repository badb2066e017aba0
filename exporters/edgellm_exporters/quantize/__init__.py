"""Quantization: a plan says which weights, a method a file says how."""
