"""Run directories: the settings and the stages of discovery, comparison and transfer."""
