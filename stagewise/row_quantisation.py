"""The former place of stagewise.models.quantization.row_wise, which model cards of older quantized models name."""

from stagewise.models.quantization.row_wise import *  # noqa: F403
