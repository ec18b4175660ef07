"""Scripts that measure, one for each question, and what they measured."""
