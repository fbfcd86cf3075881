"""HTML pages, charts and Markdown tables."""
