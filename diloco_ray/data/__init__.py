"""Text into packed token shards, and any training sequence of any epoch out of them by its number."""
