"""Triggers that are drawn: Adi et al. 2018, Zhang et al. 2018, Guo and Potkonjak 2018."""
