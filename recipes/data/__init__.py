"""Rows and images: tables, batches, edited captions."""
