"""Adapters of agsm_loss to its hosts: each module imports the core and one host, never another."""
