"""Named errors: whatever a user can get wrong ends in one of these, never in a traceback from inside jax.

All are `ValueError`s, so that callers who do not care about the kind can catch that. Every message
says what was wrong, where, what was expected and what to do.
"""


class JaxzsError(ValueError):
    """Base of all errors that jaxzs raises on bad input."""


class ConfigError(JaxzsError):
    """A model configuration is not a CLIP configuration, or its numbers do not fit together."""


class CheckpointError(JaxzsError):
    """A checkpoint cannot be found, read, or does not hold the leaves that its configuration asks for."""


class ImageError(JaxzsError):
    """An image cannot be read, or is unfit (zero area, too large)."""


class TextError(JaxzsError):
    """A text cannot be encoded: empty, too long, or made of words the model has never seen."""


class LabelError(JaxzsError):
    """A list of class names or labels is unfit: empty, duplicated, out of range."""


class DataError(JaxzsError):
    """A data source, feature file or array is unfit: missing, empty, wrong shape, not finite."""


class DependencyError(JaxzsError):
    """An optional package is absent; the message gives the install command."""


class RecordError(JaxzsError):
    """A file is not the record of a run, is damaged, or is of a schema that this version does not know."""
