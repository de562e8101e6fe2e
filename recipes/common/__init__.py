"""What the recipes share: options, the training loop, data, objectives, sampling.

Nothing here knows the toy world.
"""
