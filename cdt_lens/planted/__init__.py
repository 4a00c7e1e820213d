"""Models whose circuit is known by construction, to test methods against."""
