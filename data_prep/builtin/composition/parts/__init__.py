"""The parts: lead, counter-melody, chords, bass and drums, written bar by bar."""
