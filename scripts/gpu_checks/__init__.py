"""The parts of scripts/gpu_check.py: what is run, how it is measured, and what is written of it."""
