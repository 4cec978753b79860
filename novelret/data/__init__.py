"""What users bring: BEIR folders and Hugging Face data sets."""
