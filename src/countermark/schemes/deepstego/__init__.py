"""Triggers made by a stego network (Li and Guo 2019), and a default form that proves something."""
