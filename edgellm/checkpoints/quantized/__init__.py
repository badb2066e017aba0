"""Checkpoints whose weights were rounded by others: each method's layout of codes, scales and zeros, undone.

A method is one file: it says which stored tensors make a weight, and what numbers they stand for. Where these are whole
numbers with scales, their codes can be had as they are.
"""
