"""What the stage scripts import: data path, model loading, adapters, losses, checkpoints."""

import logging

__version__ = "0.1.0"

# On a CPU with AVX512-BF16, bitsandbytes tells at every start, whether it is used or not, that a kernel of the hub's
# is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
