"""Models for other runtimes, from the same plan."""
