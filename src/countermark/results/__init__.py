"""What a verdict consists of: readings, null hypotheses, statistics, corrections, caveats and the text."""
