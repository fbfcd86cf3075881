"""Programs that turn a corpus on disk into a store: `python -m data_prep --help`."""
