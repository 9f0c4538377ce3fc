"""The rendered demo world."""
