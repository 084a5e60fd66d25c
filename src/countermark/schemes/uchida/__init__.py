"""Marks in the weights of a layer by a random projection (Uchida et al. 2017), and its default form."""
