"""Why a side has no figures."""


class Failure(Exception):
    """A side cannot be installed, cannot take the model, or cannot run it; one line, which the table shows."""
