"""From results to Markdown, pictures and the README."""
