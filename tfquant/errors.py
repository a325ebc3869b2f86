"""Errors that a user can mend: each is one clear line that ends with what was received or what to do.

The command line prints the line and exits with code 2; in Python they are ordinary exceptions.
"""


class TfquantError(Exception):
    """Base of every error that tfquant raises on purpose."""


class ModelError(TfquantError):
    """The model cannot be read, or is not what the call says it is."""


class DataError(TfquantError):
    """The calibration data is missing, empty, of the wrong name, shape or dtype, or not finite."""


class PlanError(TfquantError):
    """A quantization plan cannot be read, or does not belong to the model at hand."""


class ConfigError(TfquantError):
    """An option has a value that it cannot have, or options contradict each other."""


class OutputError(TfquantError):
    """The output cannot be written where it was asked for."""


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
