"""What people and scripts see of a run: events, status, progress."""
