"""The simulated platform, and the demo that runs everything against it."""
