"""Report the results of a sweep: curves with one protocol, the paper's figures, and one page."""
