"""TinyTTM-style compression: a student learns from a teacher what codes to expect and what to think on the way."""
