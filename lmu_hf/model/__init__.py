"""Everything that travels with a checkpoint: the layer, the configuration, the models and the processors.

This file does not travel. It offers the others what the package has besides.
"""

from .. import native
from . import compiled

compiled.offer(native.load)
