"""Tasks: what a trained model is asked, and how its answer is read. Imports nothing: ``spec`` is read everywhere."""
