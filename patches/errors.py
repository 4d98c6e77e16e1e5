"""The package's errors. Each one takes a single message, so that it can be pickled and sent to another process."""


class PatchError(ValueError):
    """A method, option or head does not fit the backbone, or a patched model is used in a way that would break it."""


class BackboneError(ValueError):
    """A backbone cannot be built, or weights do not fit it."""


class ImageError(ValueError):
    """An image that is to be answered cannot be read or decoded. The message names the image."""


class FeatureError(ValueError):
    """Stored features cannot be written or read, or do not fit the purpose that they were given for."""


class BundleError(ValueError):
    """A bundle cannot be written, or must not be loaded."""
