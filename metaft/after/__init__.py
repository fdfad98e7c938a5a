"""What becomes of a classifier after it is trained: files that run without metaft."""
