"""What stands beside a store: attribution, Croissant metadata, a page for people."""
