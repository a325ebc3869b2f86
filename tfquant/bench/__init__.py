"""Measures models against each other: worker processes, interleaved in rounds."""
