"""Conversations to text and token ids: templates, tools, thinking, labels."""
