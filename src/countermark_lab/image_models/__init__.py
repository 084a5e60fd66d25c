"""Experiments with networks from images to images, as Zhang et al. publish them."""
