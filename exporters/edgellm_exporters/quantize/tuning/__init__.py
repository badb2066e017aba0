"""Tuned rounding: codes and scales learned against what the float model computes. Starts from any plan's codes."""
