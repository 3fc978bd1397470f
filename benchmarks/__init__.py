"""Measured comparisons. Each prints JSON lines; speed is compared within one run, never asserted in tests."""
