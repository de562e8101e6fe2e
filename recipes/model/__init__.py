"""What is trained, sampled and saved."""
