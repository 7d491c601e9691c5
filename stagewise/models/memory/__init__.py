"""Memory estimates."""
