"""Keras checkpoints of Legendre Memory Units in, models of ours out, and back. TensorFlow is not needed.

What is supported and what is not, with the reasons: README.md in this folder.
"""

from .conversion import Conversion, VerificationError, verify
from .export import export
from .keras import convert, from_keras

__all__ = ["Conversion", "VerificationError", "convert", "export", "from_keras", "verify"]
