"""TensorFlow's chatter at start-up, and that of other libraries, kept from the user's screen."""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

from absl import logging


def quiet_start() -> None:
    """Imports TensorFlow without the notes that it prints before its log level holds; a failing import prints all."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with held_back():
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")


def quiet_libraries() -> None:
    """Libraries that log keep to absl's verbosity, and those that warn of their own surroundings say nothing to the user."""
    logging.use_absl_handler()
    warnings.simplefilter("ignore")


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds back what is written to the process's stderr, and writes it after all when the block fails."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(saved, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
