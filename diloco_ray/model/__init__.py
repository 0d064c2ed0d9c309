"""The model as a thing to be built alike everywhere, measured, sampled and taken away."""
