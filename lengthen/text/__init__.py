"""What is decided about a text without a model: words, languages, filters, selection, length demands."""
