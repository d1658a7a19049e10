"""Mean compression of keys and values."""
