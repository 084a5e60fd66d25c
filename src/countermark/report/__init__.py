"""What an examiner hands over: one page for people, and a bundle that judges itself again.

record   a reading as it was judged: evidence, null hypothesis, terms, verdict
bundle   the record and the evidence of its date as a folder; replayed offline
figures  matched bits against the null, the message, the time line, as SVG
page     one HTML file without scripts, for the screen and for paper
"""
