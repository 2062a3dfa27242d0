"""Code that is written beside converted weights which no stock class loads; each file needs transformers alone."""
