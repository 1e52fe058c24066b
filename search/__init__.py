"""The search for schemes and kernel parameters."""
