"""One island: the inner loop, its life between two outer steps, and what it saves to come back."""
