"""Many clips become a file of captions, each once."""
