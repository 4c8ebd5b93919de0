"""Records to pictures and tables. Never imports torch."""
