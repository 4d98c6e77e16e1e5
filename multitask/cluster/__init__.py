"""The one way to Ray: sessions, places for actors, and what their processes share."""
