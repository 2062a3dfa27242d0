"""What a conversion can raise. All are ValueErrors, and all are raised before an output folder exists."""


class ConversionError(ValueError):
    """The checkpoint or the request is not usable; the message names what came and what is allowed."""


class UnknownFamily(ConversionError):
    """The config's model_type is not among the known families; the message lists them."""


class Refusal(ConversionError):
    """The request makes sense, but no stock model class holds the result; the message says what could."""
