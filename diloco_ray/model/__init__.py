"""The model: built, measured, exported."""
