"""Reports of a `GroupComparison`: HTML, Markdown, PNG, JSON and the terminal."""
