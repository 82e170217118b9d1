"""What is known about every method: the catalog and the compatibility table."""
