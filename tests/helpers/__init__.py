"""What several test files share; tests import it as `helpers.<module>`."""
