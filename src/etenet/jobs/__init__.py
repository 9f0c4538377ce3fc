"""Many clips -> one file of captions, each clip once."""
