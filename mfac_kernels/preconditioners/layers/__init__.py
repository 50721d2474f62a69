"""What K-FAC knows about modules, one file a kind."""
