"""Makes EtENet checkpoints. Knows the core package `etenet`; nothing in the core knows this package."""
