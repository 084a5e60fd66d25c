"""Tables of results beside the printed figures, and the pages of the documentation."""
