"""Each target's form of every canonical op."""
