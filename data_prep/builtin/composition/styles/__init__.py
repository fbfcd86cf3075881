"""The styles: what they are (`definition`), their patterns (`grooves`) and how they are played (`manners`)."""

from data_prep.builtin.composition.styles.grooves import STYLES

__all__ = ["STYLES"]
