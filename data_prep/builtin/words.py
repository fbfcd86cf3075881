"""The captions' vocabulary."""

TEMPO: dict[str, tuple[str, ...]] = {
    "slow": ("slow", "slow", "slow", "unhurried", "leisurely", "slow-paced", "slow-moving"),
    "medium": ("mid-tempo", "medium-tempo", "moderate", "moderately paced", "medium-paced"),
    "fast": ("fast", "fast", "fast", "quick", "up-tempo", "brisk", "fast-paced", "rapid"),
}
METRE_WORDS: dict[str, tuple[str, ...]] = {
    "4/4": ("in 4/4", "in common time", "in four-four time"),
    "3/4": ("in 3/4", "in three-four time", "in triple time", "in 3/4 time"),
    "6/8": ("in 6/8", "in six-eight time", "in 6/8 time", "in compound time"),
}
DENSITY: dict[str, tuple[str, ...]] = {
    "sparse": ("sparse and spacious", "with few, long notes", "simple and open", "sparsely played"),
    "moderate": ("evenly flowing", "neither sparse nor busy", "with a flowing melody"),
    "dense": ("busy and dense", "full of notes", "with many short notes", "densely played"),
}
MOODS: dict[str, tuple[str, ...]] = {
    "peaceful": ("calm", "tranquil"), "tender": ("gentle", "loving"), "dreamy": ("hazy",), "serene": ("calm", "still"),
    "romantic": ("loving",), "cheerful": ("upbeat", "sunny"), "relaxed": ("mellow", "chilled"), "hopeful": ("optimistic",),
    "bright": ("sunny", "cheery"), "carefree": ("light-hearted",), "friendly": ("amiable",), "happy": ("cheerful", "joyful"),
    "joyful": ("happy", "elated"), "energetic": ("exciting", "vigorous"), "playful": ("fun", "mischievous"),
    "triumphant": ("victorious", "heroic"), "lively": ("vivacious", "exuberant"), "sad": ("sorrowful", "mournful"),
    "melancholic": ("melancholy", "sad"), "mysterious": ("enigmatic", "eerie"), "sombre": ("grave", "gloomy"),
    "nostalgic": ("longing", "wistful"), "lonely": ("forlorn", "desolate"), "wistful": ("yearning", "longing"),
    "dark": ("gloomy", "shadowy"), "brooding": ("dark", "ominous"), "pensive": ("thoughtful", "reflective"),
    "moody": ("brooding",), "tense": ("suspenseful", "anxious"), "urgent": ("pressing", "insistent"),
    "dramatic": ("intense", "theatrical"), "restless": ("agitated", "uneasy"), "fierce": ("aggressive", "wild"),
    "stormy": ("turbulent",), "soothing": ("calming", "comforting"), "epic": ("grand", "heroic"), "hypnotic": ("trance-like",),
}
FAMILY_WORDS: dict[str, tuple[str, ...]] = {
    "piano": ("keyboard",), "mallets": ("mallet instrument", "chiming mallet instrument"), "organ": ("organ",),
    "guitar": ("guitar",), "strings": ("bowed string instrument",), "brass": ("brass instrument",),
    "reeds": ("reed instrument", "woodwind"), "flutes": ("flute-like woodwind", "woodwind"), "synth": ("synth", "synthesizer"),
}
INSTRUMENTS: dict[str, tuple[str, ...]] = {
    "piano": ("piano", "piano", "grand piano"), "bright piano": ("piano", "bright piano"),
    "honky-tonk piano": ("honky-tonk piano", "saloon piano"), "electric piano": ("electric piano", "Rhodes piano"),
    "harpsichord": ("harpsichord",), "celesta": ("celesta", "celeste"), "glockenspiel": ("glockenspiel",),
    "music box": ("music box",), "vibraphone": ("vibraphone", "vibes"), "marimba": ("marimba",), "xylophone": ("xylophone",),
    "Hammond organ": ("Hammond organ", "organ", "drawbar organ"), "church organ": ("church organ", "pipe organ", "organ"),
    "reed organ": ("reed organ", "harmonium"), "accordion": ("accordion", "squeezebox"),
    "nylon-string guitar": ("nylon-string guitar", "classical guitar", "acoustic guitar", "guitar"),
    "steel-string guitar": ("steel-string guitar", "acoustic guitar", "folk guitar"),
    "jazz guitar": ("jazz guitar", "mellow electric guitar", "guitar"),
    "clean electric guitar": ("clean electric guitar", "electric guitar"),
    "distorted electric guitar": ("distorted electric guitar", "distortion guitar", "distorted guitar"), "banjo": ("banjo",),
    "violin": ("violin", "solo violin"), "viola": ("viola",), "cello": ("cello", "solo cello"),
    "string ensemble": ("string ensemble", "string section", "string orchestra"), "fiddle": ("fiddle",),
    "trumpet": ("trumpet",), "trombone": ("trombone",), "muted trumpet": ("muted trumpet", "trumpet with a mute"),
    "French horn": ("French horn", "horn"), "brass section": ("brass section", "brass ensemble"),
    "soprano saxophone": ("soprano saxophone", "soprano sax", "saxophone"),
    "alto saxophone": ("alto saxophone", "alto sax", "saxophone", "sax"),
    "tenor saxophone": ("tenor saxophone", "tenor sax", "saxophone"), "oboe": ("oboe",), "bassoon": ("bassoon",),
    "clarinet": ("clarinet",), "piccolo": ("piccolo", "piccolo flute"), "flute": ("flute",), "recorder": ("recorder",),
    "pan flute": ("pan flute", "panpipe"), "ocarina": ("ocarina",),
    "square-wave synth lead": ("square-wave synth lead", "square-wave synth", "8-bit synth", "synth"),
    "sawtooth synth lead": ("sawtooth synth lead", "saw synth", "lead synth", "synthesizer"),
    "bass-and-lead synth": ("synth lead", "analogue synth"), "polysynth": ("polysynth", "synthesizer"),
}
BACKING_WORDS: dict[str, tuple[str, ...]] = {
    "piano": ("piano", "piano chords"), "electric piano": ("electric piano",), "harpsichord": ("harpsichord", "harpsichord continuo"),
    "organ": ("organ", "organ chords"), "church organ": ("church organ", "pipe organ"),
    "nylon-string guitar": ("nylon-string guitar", "acoustic guitar"), "steel-string guitar": ("steel-string guitar", "acoustic guitar"),
    "clean electric guitar": ("electric guitar", "clean guitar"), "overdriven guitar": ("overdriven guitar", "rhythm guitar"),
    "strings": ("strings", "soft strings"), "warm synth pad": ("a synth pad", "a warm pad"), "harp": ("harp",),
    "brass section": ("brass", "brass stabs"), "acoustic bass": ("double bass", "upright bass", "acoustic bass"),
    "bass guitar": ("bass guitar", "electric bass", "bass"), "fretless bass": ("fretless bass", "bass"),
    "synth bass": ("synth bass",), "tuba": ("tuba",), "cello": ("cello",), "drums": ("drums", "percussion", "a drum beat"),
}
STYLE_NOUNS: dict[str, tuple[str, ...]] = {
    "waltz": ("waltz", "waltz", "waltz tune"), "jazz swing": ("swing tune", "jazz swing", "jazz number", "swing jazz piece"),
    "bossa nova": ("bossa nova", "bossa nova tune"), "rock": ("rock track", "rock song", "rock instrumental"),
    "folk": ("folk tune", "folk song", "folk melody"), "techno": ("techno track", "electronic dance track", "techno beat"),
    "synth-pop": ("synth-pop track", "synth-pop song", "electronic pop track"), "baroque": ("baroque piece", "baroque dance"),
    "classical": ("classical piece", "classical tune"), "ballad": ("ballad",), "reggae": ("reggae tune", "reggae track"),
    "march": ("march", "march tune"), "tango": ("tango",), "ambient": ("ambient piece", "ambient track"), "lullaby": ("lullaby", "cradle song"),
    "jig": ("jig", "jig tune"), "polka": ("polka",), "country": ("country tune", "country song"), "funk": ("funk track", "funk groove"),
    "blues": ("blues", "blues tune"), "salsa": ("salsa", "salsa tune"), "hymn": ("hymn", "hymn tune"),
    "cinematic": ("cinematic piece", "film score cue", "soundtrack piece"),
    "chiptune": ("chiptune", "video game tune", "retro game theme"),
}
