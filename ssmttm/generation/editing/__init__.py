"""Music from music: continuation, regeneration of a region, loops."""
