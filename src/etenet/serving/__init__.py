"""A checkpoint becomes an HTTP server."""
