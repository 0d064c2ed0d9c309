"""The way between islands and coordinator: one protocol, one class per carrier."""
