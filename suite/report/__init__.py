"""Report: tables, figures, claims and the page, from files alone."""
