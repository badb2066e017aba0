"""The uses that models are trained for: their data, prompts, metrics and baselines. Imports nothing heavy."""
