"""The report of an examiner: one page for people, and a bundle that can be judged again.

record    a reading as it was judged: bits, null hypothesis, options and verdict
bundle    a folder with the record and the evidence of its date, replayed offline
dated     the options of `verify` about a claim, and the documents that date a key
figures   matched bits against the null hypothesis, the message, and the time line, as SVG
measured  the measured false claims and robustness of each form of a scheme
page      one HTML file without scripts, for the screen and for paper
"""
