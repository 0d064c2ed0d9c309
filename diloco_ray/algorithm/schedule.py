"""When in a round each fragment is sent. It does not know how long a step takes, nor when an outer step comes back."""


def send_steps(num_steps: int, num_fragments: int, together: bool = False) -> tuple[int, ...]:
    """For each fragment the inner step of a round, 1 .. num_steps, after which it is sent, in rising order.

    Streaming DiLoCo (arXiv 2501.18512, Algorithm 2) sends fragment p of P at the steps t with t = t_p (mod H), and
    spreads the offsets t_p evenly over the H = num_steps steps of a round, so that the peak bandwidth falls by P:

        t_p = ceil(H (p + 1) / P),     together: t_p = H, which is DiLoCo's round (arXiv 2311.08105, Algorithm 1)

    The last fragment is sent at the round's end. With P > H some steps send several. ValueError unless both are >= 1.
    """
    if num_steps < 1 or num_fragments < 1:
        raise ValueError(f"num_steps={num_steps}, num_fragments={num_fragments}: both are at least 1")
    if together:
        return (num_steps,) * num_fragments
    return tuple(-(-num_steps * (index + 1) // num_fragments) for index in range(num_fragments))
