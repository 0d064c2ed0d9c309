"""The mathematics of an outer step, on flat float32 tensors: nothing here knows time, networks, files or Ray."""
