"""Marks read by a secret independent network, MANU and AUTO (Wang et al. 2020)."""
