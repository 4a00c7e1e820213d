"""From rows of data to batches of prompts: row -> prompt -> Example -> Batch."""
