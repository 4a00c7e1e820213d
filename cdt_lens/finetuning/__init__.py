"""Circuit-targeted fine-tuning (CT-SFT, arXiv 2601.08146)."""
