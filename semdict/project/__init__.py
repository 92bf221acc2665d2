"""A user's project: a preset for images of one's own, and checks of all that params.yaml names."""
