"""The report: the records of a sweep to the paper's figures, one page, a table."""
