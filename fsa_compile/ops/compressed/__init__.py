"""Compressed attention: softmax over the compressed tokens whose whole window is in the past."""
