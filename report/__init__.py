"""The report: the paper's figures, one page and a table from the records of a sweep."""
