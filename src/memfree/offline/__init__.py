"""A small text-to-image world that needs no download."""
