"""What ``scripts/families.py`` is made of: the rows, how each is tried, and the document that tells the outcome."""
