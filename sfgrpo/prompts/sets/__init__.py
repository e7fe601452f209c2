"""Sets of prompts that come with the package: signs.jsonl asks for text in an image."""
