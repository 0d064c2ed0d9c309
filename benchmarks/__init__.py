"""Measurements: ratios against floors and peers, and the papers' claims. Never run by CI."""
