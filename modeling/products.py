"""For which numbers this CPU has instructions, as torch uses them."""

import torch


def list_fast_products() -> list[torch.dtype]:
    """The dtypes whose products of matrices are computed by instructions of this CPU."""
    dtypes = [torch.float32, torch.float64]
    if torch.backends.mkldnn.is_available():
        kernels = torch.ops.mkldnn
        dtypes += [torch.bfloat16] if kernels._is_mkldnn_bf16_supported() else []
        dtypes += [torch.float16] if kernels._is_mkldnn_fp16_supported() else []
    return dtypes


FAST_PRODUCTS = list_fast_products()
