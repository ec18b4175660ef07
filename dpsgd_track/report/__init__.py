"""Charts and texts made from a `GroupComparison`: HTML, Markdown, PNG, JSON, terminal."""
