"""How much arithmetic a token costs (PaLM, arXiv 2204.02311, appendix B)."""


def flops_per_token(num_params: int, num_layers: int, hidden: int, sequence_length: int) -> int:
    """Floating point operations of one training token, forward and backward: 6 N + 12 L d T.

    N parameters take a multiply and an add each, and twice that on the way back; attention over T positions adds
    12 T d per layer (d = heads x head size). Nothing is taken off for causal masks, as is the custom.
    """
    return 6 * num_params + 12 * num_layers * hidden * sequence_length
