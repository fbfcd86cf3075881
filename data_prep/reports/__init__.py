"""Files that describe a store: attribution, Croissant metadata and an HTML report."""
