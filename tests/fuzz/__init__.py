"""Damaged and hostile input: what makes it, and what watches the package while it reads it. See `__main__`."""
