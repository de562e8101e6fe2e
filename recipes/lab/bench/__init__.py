"""Time and memory: of the loss, of a training step, of the hosts; ratios measured side by side."""
