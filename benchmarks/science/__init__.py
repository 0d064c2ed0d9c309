"""The papers' claims at toy size, through the real engine: what is run (variants), what is said of it (claims)."""
