"""Device time and money."""
