"""The run as files: a chain of outer steps in a run store, snapshots to start from, and the proof that they agree."""
