"""The engine without a cluster: the same coordinator, log and islands in one process."""
