"""Marks in the images of image-to-image networks (Zhang et al. 2021)."""
