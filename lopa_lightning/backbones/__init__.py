"""Backbones, which stay as they are: the models, where virtual tokens go, and what is read from them."""
