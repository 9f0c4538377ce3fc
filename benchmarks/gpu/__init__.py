"""How fast each stage is on a GPU: `python -m benchmarks.gpu`."""
