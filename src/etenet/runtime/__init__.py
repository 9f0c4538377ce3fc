"""The model package made fast, on a CPU and on a GPU."""
