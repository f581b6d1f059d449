"""Long convolutions."""

from structmat_kernels.fft_conv.op import fft_conv, supported

__all__ = ["fft_conv", "supported"]
