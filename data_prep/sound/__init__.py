"""What is done with sound: decoding any file safely, measuring, fingerprints and duplicates, voices."""
