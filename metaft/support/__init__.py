"""What all parts of metaft use and nothing of its subject is in: paths, printing, PyTorch's modes, other libraries."""
