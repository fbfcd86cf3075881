"""English words for the tags of music corpora, MTG-Jamendo's above all."""

CATEGORIES = {
    "genre": "genre", "genres": "genre", "style": "genre",
    "instrument": "instrument", "instruments": "instrument",
    "mood/theme": "mood", "mood": "mood", "moods": "mood", "theme": "mood", "moodtheme": "mood",
    "tempo": "tempo", "bpm": "tempo", "key": "key",
}  # fmt: skip

GENRES = {
    "60s": "1960s-style", "70s": "1970s-style", "80s": "1980s-style", "90s": "1990s-style", "acidjazz": "acid jazz",
    "alternativerock": "alternative rock", "bluesrock": "blues rock", "bossanova": "bossa nova",
    "chillout": "chill-out", "choir": "choral", "classicrock": "classic rock", "darkambient": "dark ambient",
    "deephouse": "deep house", "drumnbass": "drum and bass", "easylistening": "easy-listening", "edm": "EDM",
    "ethno": "ethnic", "hardrock": "hard rock", "heavymetal": "heavy metal", "hiphop": "hip-hop", "hip-hop": "hip-hop",
    "idm": "IDM", "improvisation": "improvised", "instrumentalpop": "instrumental pop",
    "instrumentalrock": "instrumental rock", "jazzfusion": "jazz fusion", "newage": "new-age", "newwave": "new-wave",
    "popfolk": "pop folk", "poprock": "pop rock", "postrock": "post-rock", "punkrock": "punk rock", "rnb": "R&B",
    "rocknroll": "rock and roll", "singersongwriter": "singer-songwriter", "soul-rnb": "soul and R&B",
    "synthpop": "synth-pop", "triphop": "trip-hop", "worldfusion": "world fusion",
}  # fmt: skip

# With an article, except plurals and mass nouns.
INSTRUMENTS = {
    "acousticbassguitar": "an acoustic bass guitar", "acousticguitar": "an acoustic guitar", "bass": "a bass",
    "beat": "a steady beat", "bell": "bells", "bongo": "bongos", "brass": "brass",
    "classicalguitar": "a classical guitar",
    "computer": "computer-made sounds", "doublebass": "a double bass", "drummachine": "a drum machine",
    "electricguitar": "an electric guitar", "electricpiano": "an electric piano", "pad": "synth pads",
    "percussion": "percussion", "pipeorgan": "a pipe organ", "rhodes": "a Rhodes piano", "sampler": "samples",
}  # fmt: skip

# Themes as uses of the music; other moods and themes are adjectives.
USES = {
    "action": "an action scene", "adventure": "an adventure", "advertising": "advertising",
    "background": "the background", "children": "children", "christmas": "Christmas", "commercial": "a commercial",
    "corporate": "a corporate video", "documentary": "a documentary", "drama": "a drama", "film": "a film",
    "game": "a game", "holiday": "the holidays", "movie": "a film", "nature": "nature scenes", "party": "a party",
    "space": "a journey through space", "sport": "sports", "summer": "summer", "trailer": "a trailer",
    "travel": "a travel video",
}  # fmt: skip

MOODS = {
    "ballad": "ballad-like", "dream": "dreamy", "love": "romantic", "soundscape": "atmospheric", "fun": "playful",
    "motivational": "motivating",
}  # fmt: skip
TEMPI = {"fast", "slow"}  # mood tags of MTG-Jamendo

VOCALS = {"voice", "vocal", "vocals", "choir", "rap", "singersongwriter", "singer-songwriter", "chanson", "acapella",
          "a cappella", "spoken", "spoken word", "speech"}  # fmt: skip

PROPER_ADJECTIVES = {
    "african", "american", "asian", "balkan", "brazilian", "british", "celtic", "cuban", "english", "european",
    "french", "german", "greek", "indian", "irish", "italian", "japanese", "jewish", "latin", "russian", "scottish",
    "spanish", "turkish",
}  # fmt: skip
