"""Conversation -> conditioned conversation: what a domain's better completions are, shown to both scoring models."""
