"""From conversations to text, token ids and labels: templates, tools, thinking."""
