"""Small decoders for the codes of a teacher codec."""
