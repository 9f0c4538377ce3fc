"""What several benchmarks need: results, timing, clips, load, servers, networks, plots."""
