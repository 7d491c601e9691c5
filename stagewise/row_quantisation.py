"""The former place and names of stagewise.models.quantization.row_wise, which older model cards give."""

from stagewise.models.quantization.row_wise import load_row_quantized as load_row_quantised

__all__ = ["load_row_quantised"]
