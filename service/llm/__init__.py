"""openai and instructor behind the pipeline's Extractor."""
