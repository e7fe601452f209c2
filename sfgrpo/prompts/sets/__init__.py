"""Sets of prompts that come with the package.

signs.jsonl         asks for text in an image
sign_edits.jsonl    asks for another text on an image of a sign; drawn with Pillow's own font
"""
