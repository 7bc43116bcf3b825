"""Configurations of the convolution, whose launches the cases of the gated delta net make."""

_BLOCKS = ((4, 64, 2), (8, 256, 1), (8, 512, 2), (8, 1024, 4), (16, 256, 1), (16, 512, 2))

CANDIDATES = {
    "causal_conv1d": [{"BLOCK_T": t, "BLOCK_C": c, "num_warps": w} for t, c, w in _BLOCKS],
    "causal_conv1d_step": [
        {"BLOCK_C": c, "num_warps": w} for c, w in ((64, 2), (128, 2), (128, 4), (256, 4), (512, 4))
    ],
}
