"""What benchmarks stand on: records, clips, load, servers."""
