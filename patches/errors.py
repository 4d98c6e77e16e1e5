"""The package's errors. Each takes one message, so that it survives the way between processes."""


class PatchError(ValueError):
    """A method, option or head that does not go with the backbone, or a use of a patched model that would break it."""


class BackboneError(ValueError):
    """A backbone that cannot be built, or weights that do not fit it."""


class FeatureError(ValueError):
    """Stored features that cannot be written, read, or used where they were given."""


class BundleError(ValueError):
    """A bundle that cannot be written or must not be loaded."""
