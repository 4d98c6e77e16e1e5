"""Everything that concerns the Ray cluster: sessions, places for actors, and the logs and memory of processes."""
