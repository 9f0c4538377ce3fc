"""What a GPU makes of each stage: `python -m benchmarks.gpu`."""
