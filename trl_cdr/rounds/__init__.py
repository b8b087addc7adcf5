"""Rounds of annotation and training. `annotation` and `training` know nothing of each other; this room knows both."""
