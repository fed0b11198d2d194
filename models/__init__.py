"""Models that Remoe builds itself rather than downloads."""
